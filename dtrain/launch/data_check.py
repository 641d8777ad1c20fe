"""Are the data fit for a training? Labels within the classes, no sample in two sets, every sample readable."""

import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter
from torch.utils.data import DataLoader, Subset

from dtrain.config.errors import first_few, one_line
from dtrain.data import batch as batches
from dtrain.data.heads import main_pair
from dtrain.data.sample_files import FILE_LISTS, file_of
from dtrain.data.seeded_samples import SeededBatches
from dtrain.launch.doctor import Finding
from dtrain.trainer import Trainer

LOOKED_AT = 1000  # samples of each set, at most,
SECONDS = 1.0  # in so many seconds
MOST_CLASSES = 1000  # of which it is said which ones were not seen
_SHARE_OF_READS = 16  # samples that a worker reads at a time


class Look(NamedTuple):
    """What one sample of a set is like, as its loader gives it; or why it cannot be had."""

    number: int  # in the set
    problem: str = ""
    labels: Mapping[int, int] = {}  # of an integer target: each label, how often
    digest: bytes = b""  # of its inputs


class Keys(NamedTuple):
    """Which entries of a dict batch are inputs and target."""

    input_key: str | None
    target_key: batches.TargetKey


class Looks(NamedTuple):
    """What was seen of a set."""

    name: str
    size: int
    looks: Sequence[Look]
    is_drawn: bool = False  # whether its samples are drawn anew each time, as with augmentation


def look_at(samples: SeededBatches, index: int, keys: Keys) -> Look:
    """Load one sample and look at it; whatever it raises is its problem."""
    try:
        batch = samples.batch(0, index)
        if batch is None:  # left out by a collate_fn
            return Look(index)
        inputs, target = batches.inputs(batch, *keys), _target(batch, keys)
        tensors = [leaf.detach().cpu() for leaf in tree_iter(inputs) if isinstance(leaf, Tensor)]
        if any(leaf.is_floating_point() and not bool(leaf.isfinite().all()) for leaf in tensors):
            return Look(index, "its input has values that are not finite (NaN or infinity)")
        digest = hashlib.blake2b(digest_size=16)
        for leaf in tensors:
            digest.update(leaf.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return Look(index, "", _counted(target), digest.digest() if tensors else b"")
    except Exception as error:
        return Look(index, one_line(f"{type(error).__name__}: {error}"))


def _target(batch: Any, keys: Keys) -> Any:
    try:
        target = batches.split(batch, *keys)[1]
    except ValueError:  # there is none
        return None
    return target if isinstance(target, Tensor) else None


def _counted(target: Any) -> dict[int, int]:
    if target is None or target.is_floating_point() or target.is_complex():
        return {}
    labels, counts = target.unique(return_counts=True)
    return dict(zip(map(int, labels.tolist()), map(int, counts.tolist()), strict=True))


def looked_at(name: str, samples: SeededBatches, keys: Keys) -> Looks:
    """A part of a set, evenly over all of it, as many as a second is long enough for."""
    size = len(samples)
    end = time.monotonic() + SECONDS
    looks = []
    stride = max(1, size // LOOKED_AT)
    for index in range(0, size, stride):
        looks.append(look_at(samples, index, keys))
        if time.monotonic() > end:
            break
    return Looks(name, size, looks, samples.random is not False and samples.random is not None)


class _Reader(torch.utils.data.Dataset):
    """Looks at several samples, in a worker."""

    def __init__(self, samples: SeededBatches, keys: Keys) -> None:
        self._samples, self._keys = samples, keys

    def __len__(self) -> int:
        return len(self._samples)

    def __getitems__(self, indices: list[int]) -> list[Look]:
        return [look_at(self._samples, index, self._keys) for index in indices]

    def __getitem__(self, index: int) -> Look:
        return look_at(self._samples, index, self._keys)


def read_all(loader: Any, keys: Keys) -> Iterator[Look]:
    """Every sample of a set, read once, by as many workers as the config has."""
    workers = loader.num_workers
    options: dict[str, Any] = {"num_workers": workers}
    if workers:
        options |= {"multiprocessing_context": loader.multiprocessing_context, "worker_init_fn": loader.worker_init_fn}
    reader = DataLoader(_Reader(loader.dataset, keys), batch_size=_SHARE_OF_READS, collate_fn=list, **options)
    done = 0
    try:
        for looks in reader:
            done += len(looks)
            yield from looks
    except RuntimeError as error:  # a worker was killed: by the sample's own library, or for its memory
        end = min(done + _SHARE_OF_READS * max(1, workers), len(loader.dataset))
        yield Look(done, one_line(f"a worker died while it read the samples {done} to {end - 1}: {error}"))


def place_of(dataset: Any, index: int) -> str:
    """The file of a sample in brackets, where there is one."""
    return f" ({file})" if (file := file_of(dataset, index)) else ""


def classes_of(trainer: Trainer) -> tuple[int, set[int]] | None:
    """How many classes the model tells apart in one validation or training batch, and which labels do not count.

    None where that does not show: there is no target of integers with one output per class.
    """
    forward: Any = trainer.forward
    if trainer.ranks.strategy.is_sharded or forward.criterion is None or forward.criterion.of_model:
        return None
    parts, loader = trainer.trainables, trainer.train_loader
    try:
        batch = loader.batches.batch(*loader.shard.requests_from(0, 0, 1)[0])
        with torch.no_grad(), parts.evaluating(parts.compiled):  # without the loss, which may refuse the labels
            output = forward.run(parts.compiled, forward.inputs(batch))
        output, target = main_pair(output, batches.split(batch, forward.input_key, forward.target_key)[1])
    except Exception:  # a training_step of its own calls the model otherwise
        return None
    finally:
        trainer.model.train()
    if not (isinstance(output, Tensor) and isinstance(target, Tensor)) or target.is_floating_point():
        return None
    if output.dim() != target.dim() + 1 or output.dim() < 2:
        return None
    objects = [*forward.criterion.objects.values(), *(forward.criterion.modules_now().modules())]
    ignored = {getattr(item, "ignore_index", None) for item in objects}
    return max(2, output.size(1)), {item for item in ignored if isinstance(item, int)}


def label_findings(
    looks: Sequence[Looks], known: tuple[int, set[int]] | None, datasets: Mapping[str, Any], is_all: bool
) -> Iterator[Finding]:
    """Whether labels are among the model's classes, and which classes have no sample in the training data.

    Args:
        looks: Of each set.
        known: What `classes_of` found.
        datasets: By set.
        is_all: Whether every sample was looked at, so that a class without one has none.
    """
    if known is None:
        return
    classes, ignored = known
    ranges = []
    for each in looks:
        counts = _sum_of_labels(each, ignored)
        if not counts:
            continue
        ranges.append(f"{each.name} {min(counts)} to {max(counts)}")
        if not (min(counts) >= 0 and max(counts) < classes):
            yield _wrong_label(each, classes, ignored, datasets)
        missing = [str(label) for label in range(min(classes, MOST_CLASSES)) if label not in counts]
        is_telling = is_all or len(each.looks) >= max(100, 20 * classes) or len(each.looks) == each.size
        if each.name == "train" and missing and is_telling:
            text = f"train has no label {first_few(missing, 8)} in {len(each.looks):,} of {each.size:,} samples"
            yield Finding("labels", "warn", text, f"the model has {classes} classes: are there so many?")
    if ranges:
        count = sum(len(each.looks) for each in looks)
        yield Finding("labels", "ok", f"{', '.join(ranges)}; {classes} classes ({count:,} samples looked at)")


def _sum_of_labels(looks: Looks, ignored: set[int]) -> Counter[int]:
    counts: Counter[int] = Counter()
    for look in looks.looks:
        counts.update({label: count for label, count in look.labels.items() if label not in ignored})
    return counts


def _wrong_label(looks: Looks, classes: int, ignored: set[int], datasets: Mapping[str, Any]) -> Finding:
    """The first sample with a label that is none of the classes."""
    wrong = ((look.number, label) for look in looks.looks for label in look.labels
             if label not in ignored and not 0 <= label < classes)  # fmt: skip
    index, label = next(wrong)
    text = f"{looks.name}: sample {index}{place_of(datasets[looks.name], index)} has the label {label}"
    text += f"; the model has {classes} classes, 0 to {classes - 1}"
    return Finding("labels", "fail", text, "more classes, other labels, or the loss's ignore_index")


def overlap_findings(looks: Sequence[Looks], datasets: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether a sample of the training data is in another set: by place in one dataset, by file, or by content."""
    train = next((each for each in looks if each.name == "train"), None)
    others = [each for each in looks if each.name != "train"]
    if train is None or not others:
        return
    by_digest = {look.digest: look.number for look in train.looks if look.digest}
    files = _files(datasets["train"])
    said = False
    for each in others:
        dataset = datasets[each.name]
        text = ""
        if shared := _shared_places(datasets["train"], dataset):
            text = f"{len(shared):,} samples of {each.name} are those of train (the same indices of one dataset)"
        elif same := sorted(path for path in files & _files(dataset) if path.exists()):  # else a name in a folder
            text = f"{len(same):,} files of {each.name} are also in train: {first_few(list(map(str, same)), 3)}"
        elif equal := [look for look in each.looks if look.digest in by_digest]:
            first = equal[0]
            one, other = place_of(dataset, first.number), place_of(datasets["train"], by_digest[first.digest])
            text = (
                f"{len(equal):,} of {len(each.looks):,} samples of {each.name} are equal to one of train, such as "
                f"sample {first.number}{one} to {by_digest[first.digest]}{other}"
            )
        if text:
            said = True
            yield Finding("overlap", "warn", text, f"{each.name} figures would be better than on new data")
    if not said:
        how = "files compared; train is drawn at random, so contents could not be" if train.is_drawn else (
            f"{sum(len(each.looks) for each in looks):,} samples compared by content"
        )  # fmt: skip
        yield Finding("overlap", "ok", f"train shares nothing with {', '.join(each.name for each in others)} ({how})")


def _shared_places(one: Any, other: Any) -> set[int]:
    """Indices that two parts of one dataset both have."""
    (base, indices), (other_base, other_indices) = _part(one), _part(other)
    if base is not other_base or indices is None or other_indices is None:
        return set()
    return set(indices) & set(other_indices)


def _part(dataset: Any) -> tuple[Any, list[int] | None]:
    indices: list[int] | None = None
    while isinstance(dataset, Subset):
        own = [int(index) for index in dataset.indices]
        indices = own if indices is None else [own[index] for index in indices]
        dataset = dataset.dataset
    return dataset, indices


def _files(dataset: Any) -> set[Path]:
    """The files that a dataset lists, one for each sample or several for all."""
    base, indices = _part(dataset)
    found: set[Path] = set()
    for name in FILE_LISTS:
        listed = getattr(base, name, None)
        if not isinstance(listed, list | tuple):
            continue
        chosen = [listed[index] for index in indices] if indices is not None and len(listed) == len(base) else listed
        for item in chosen:
            path = item[0] if isinstance(item, list | tuple) and item else item
            if isinstance(path, str | Path):
                found.add(Path(path).absolute())
    return found
