"""What no signature can say of a config: the sections that a purpose needs, ranges of numbers, exclusive settings."""

import ast
import math
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dtrain.config.annotations import wrong_type
from dtrain.config.did_you_mean import did_you_mean
from dtrain.config.durations import POSSIBLE, seconds_of
from dtrain.config.errors import ConfigError, KeyPath, Mistake, found, is_mapping, shown
from dtrain.config.folds import are_folds, fold_mistakes
from dtrain.config.schema import PHASES, SLOTS, Call, has_several, mistake, own_loop, read
from dtrain.config.signatures import SOURCE

MAX_NAME_BYTES = 200  # a moved-aside run folder has a time stamp, too, and file systems take 255; MLflow 250
TOP_LEVEL = {  # the keys of a config with their types; those without one are checked elsewhere
    "config_version": "int | None",
    "experiment": "str | None",
    "run_name": "str | None",
    "seed": "int | None",
    "device": "str | list[str]",
    "modules": "",
    "optional_modules": "",
    **dict.fromkeys((*SLOTS, "predictor", "cluster", "sweep"), ""),
}
REQUIRED = {  # what training needs, and an example of each
    "model": "{name: ViT, ...}",
    "loaders": "{name: Digits, batch_size: 64, train: {split: train}}",
    "loss": "{name: CrossEntropyLoss}",
    "optimizer": "{name: AdamW, lr: 1e-3}",
}
PURPOSES = {  # what a config is used for: the sections that it needs, and one of the phases
    "train": (("model", "loaders", "loss", "optimizer"), ("train",)),
    "test": (("model", "loaders"), ("test",)),
    "predict": (("model", "loaders"), ("predict", "test")),
    "export": (("model",), ()),
}
SUMMED = (  # of a loss
    "adds its samples up, so that gradients would depend on trainer.accumulate, on the number of ranks and on the "
    "batch size: use reduction: mean, with an optimizer.lr that is as many times as large"
)
_LIBRARIES = ("torch.", "monai.", "dtrain.")  # whose `reduction: sum` is known to be a sum
_PLAIN = ("torch.nn.", "dtrain.components.", "monai.networks.nets.")  # whose models return outputs, never a loss
_ANY, _SOME, _PART = (0, math.inf), (1, math.inf), (0, 1)
RANGES: dict[str, dict[str, tuple[float, float]]] = {  # where the type alone admits more
    "": {"seed": _ANY, "config_version": _SOME},
    "trainer": {
        "max_epochs": _ANY, "max_steps": _ANY, "steps_per_epoch": _SOME, "accumulate": _SOME, "log_every_steps": _SOME,
        "validate_every_steps": _SOME, "checkpoint_every_steps": _SOME, "keep_last": _SOME, "keep_best": _ANY,
        "spare_memory_every_steps": _SOME, "checkpoint_every_minutes": _ANY, "hang_timeout_seconds": _ANY,
        "mirror_exit_timeout_seconds": _ANY,
        "early_stop_patience": _SOME, "clip_grad_norm": _ANY, "ema_decay": _PART,
    },
    "loaders": {
        "batch_size": _SOME, "global_batch_size": _SOME, "num_workers": _ANY, "prefetch_factor": _SOME, "timeout": _ANY,
        "every_epochs": _SOME,
    },
    "optimizer": {"layer_decay": _PART},
    "lr_scheduler": {"warmup_steps": _ANY, "warmup_start": _ANY},
    "mlflow": {"exit_timeout_seconds": _ANY},
    "cluster": {
        "spares": _ANY, "gpus_per_node": _ANY, "nproc_per_node": _SOME, "cpus_per_node": _SOME,
        "signal_seconds": _SOME,
    },
    "sweep": {"trials": _SOME},
    "predictor": {
        "batch_size": _SOME, "prediction_channel": _ANY, "connectivity": (1, 3), "min_size": _ANY, "slab_planes": _SOME,
    },
}  # fmt: skip

_LEAST_OF_PARTS = (  # of `trainer`
    *(("swa", "start_epoch", 1), ("swa", "anneal_epochs", 0), ("swa", "lr", 0)),
    *(("profile", "steps", 1), ("profile", "after", 1)),
)


def rule_mistakes(config: ConfigDict, purpose: str | None) -> Iterator[Mistake]:
    """What is wrong with a config as a whole, for a purpose (None: what its data are for)."""
    yield from _top_level_mistakes(config)
    yield from strategy_mistakes(config, config.get("trainer"))
    yield from _exclusive_mistakes(config)
    yield from _name_mistakes(config)
    yield from _missing_mistakes(config, purpose)
    yield from _deep_supervision_mistakes(config)


def _top_level_mistakes(config: ConfigDict) -> Iterator[Mistake]:
    """Unknown sections, and wrong values of the keys that are not sections."""
    for key in config:
        if key == "_base_":
            yield mistake(config, (key,), "stands in the file, which names what it extends; not on the command line")
        elif key not in TOP_LEVEL:
            text = f"unknown section{did_you_mean(key, TOP_LEVEL)}; possible: {', '.join(TOP_LEVEL)}"
            yield mistake(config, (key,), text)
        elif wrong := TOP_LEVEL[key] and wrong_type(config[key], ast.parse(TOP_LEVEL[key], mode="eval").body):
            yield mistake(config, (key,), wrong)
    device = config.get("device", "auto")
    devices = [device] if isinstance(device, str) else device if isinstance(device, list | tuple) else ["auto"]
    for each in devices or [""]:
        if isinstance(each, str) and not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,3})?", each):
            text = f"{shown(each)} is not a device; possible: auto, cpu, cuda, cuda:N, mps, or a list of them"
            yield mistake(config, ("device",), text)


def value_mistakes(config: ConfigDict) -> Iterator[Mistake]:
    """Values of the right type that cannot be: numbers out of range, two batch sizes, MLflow's old `file:` stores."""
    for section, ranges in RANGES.items():
        values = config.get(section) if section else config
        path: KeyPath = (section,) if section else ()
        inner = values if section in ("optimizer", "lr_scheduler") and is_mapping(values) else ()
        of_several = [((*path, key), _at(values, key)) for key in inner]
        for where, mapping in [(path, values), *of_several, *_in_phases(path, values)]:
            for key, (least, most) in ranges.items():
                value = _at(mapping, key)
                if type(value) in (int, float) and not least <= value <= most:
                    possible = f"from {least} to {most}" if most < math.inf else f"at least {least}"
                    yield mistake(config, (*where, key), f"must be {possible}, found {value}")
            if _at(mapping, "batch_size") is not None and _at(mapping, "global_batch_size") is not None:
                text = "cannot be combined with 'batch_size'; keep one of them, or set the other to null"
                yield mistake(config, (*where, "global_batch_size"), text)
    loaders = config.get("loaders")
    for key, text in fold_mistakes(loaders["folds"]) if are_folds(loaders) else ():
        yield mistake(config, ("loaders", "folds", key), text)
    yield from _time_mistakes(config)
    yield from _limit_mistakes(config)
    yield from _scheme_mistakes(config)
    for path in _sums(config):
        yield mistake(config, path, f"sum {SUMMED}")
    yield from _mirror_mistakes(config)
    yield from _volume_mistakes(config)
    uri = _at(config.get("mlflow"), "tracking_uri")
    if isinstance(uri, str) and uri.lower().startswith("file:"):
        text = f"MLflow 3 no longer writes to {shown(uri)}; name the folder alone (sqlite is put in it), or a server"
        yield mistake(config, ("mlflow", "tracking_uri"), text)


def _in_phases(path: KeyPath, values: Any) -> Iterator[tuple[KeyPath, Any]]:
    """The keys of each phase, of several sets of each, with their paths."""
    for phase in PHASES:
        own = _at(values, phase)
        several = isinstance(own, list)
        yield from (
            (((*path, phase, index), item) for index, item in enumerate(own)) if several else [((*path, phase), own)]
        )


def _time_mistakes(config: ConfigDict) -> Iterator[Mistake]:
    """A `trainer.time_limit` that is not a time."""
    limit = _at(config.get("trainer"), "time_limit")
    if type(limit) not in (int, float, str):
        return  # none, or of a wrong type, which is told anyway
    try:
        seconds_of(limit)
    except ValueError:
        yield mistake(config, ("trainer", "time_limit"), f"expected a time above 0: {POSSIBLE}; {found(limit)}")


def _limit_mistakes(config: ConfigDict) -> Iterator[Mistake]:
    """Numbers of batches that are none, and what `trainer.swa` and `trainer.profile` cannot be."""
    trainer = config.get("trainer")
    limit, overfit = _at(trainer, "limit_batches"), _at(trainer, "overfit_batches")
    values: dict[KeyPath, Any] = {("overfit_batches",): overfit, ("limit_batches",): limit}
    if is_mapping(limit):
        values = {("overfit_batches",): overfit, **{("limit_batches", key): limit[key] for key in limit}}
    for path, value in values.items():
        if path[1:] and path[1] not in PHASES[:3]:
            text = f"is not a phase{did_you_mean(str(path[1]), PHASES[:3])}; possible: {', '.join(PHASES[:3])}"
        elif value is None or _is_count(value):
            continue
        else:
            text = f"must be a number of batches from 1 on, or a share of them between 0 and 1, {found(value)}"
            text += "; loaders.val=null leaves the validation out" if value == 0 and path[-1] == "val" else ""
        yield mistake(config, ("trainer", *path), text)
    if limit is not None and overfit is not None:
        yield mistake(
            config, ("trainer", "overfit_batches"), "cannot be combined with 'limit_batches'; keep one of them"
        )
    swa = _at(trainer, "swa")
    if swa and has_several(config.get("optimizer")):
        why = "sets the rate of one optimizer, and here are several"
        yield mistake(config, ("trainer", "swa"), f"{why} ({', '.join(config.optimizer)}); ema_decay averages as well")
    for section, key, least in _LEAST_OF_PARTS:
        value = _at(_at(trainer, section), key)
        if type(value) in (int, float) and value < least:
            yield mistake(config, ("trainer", section, key), f"must be at least {least}, found {value}")


def _is_count(value: Any) -> bool:
    """A number of batches, or a share of them."""
    return value >= 1 if type(value) is int else type(value) is float and 0 < value <= 1


def _scheme_mistakes(config: ConfigDict) -> Iterator[Mistake]:
    """An address of `trainer.mirror_to` that fsspec cannot know."""
    address = _at(config.get("trainer"), "mirror_to")
    if not isinstance(address, str):
        return
    scheme, sign, rest = address.partition("://")
    if not address.strip() or (sign and not rest.strip("/")):
        text = f"{shown(address)} names no place; possible: s3://bucket/name, gs://bucket/name, a folder"
        yield mistake(config, ("trainer", "mirror_to"), text)
    elif sign and scheme.lower() not in (known := _schemes()):
        near = did_you_mean(scheme.lower(), known)
        text = f"{shown(scheme)} is not a scheme of fsspec{near}; possible: s3, gs, abfs, sftp, ... or a folder"
        yield mistake(config, ("trainer", "mirror_to"), text)
    elif sign and scheme.lower() == "memory":
        yield mistake(config, ("trainer", "mirror_to"), "memory:// is gone with the process that writes it")


def _schemes() -> set[str]:
    from fsspec.registry import known_implementations  # which torch requires

    return set(known_implementations)


def _mirror_mistakes(config: ConfigDict) -> Iterator[Mistake]:
    """Axes that no image has, as far as patches say how many there are."""
    axes, loaders = _at(config.get("predictor"), "mirror"), config.get("loaders")
    if not isinstance(axes, list) or not all(type(axis) is int for axis in axes):
        return
    of_data = [loaders, *(values for _, values in _in_phases((), loaders))]
    owners = [config.get("predictor"), *(_at(values, "slice_builder") for values in of_data)]
    lengths = [len(shape) for owner in owners if isinstance(shape := _at(owner, "patch_shape"), list)]
    if len(set(axes)) < len(axes) or min(axes, default=0) < 0:
        text = "must be different axes, counted from 0 on, such as [0, 1, 2]"
    elif lengths and max(axes, default=0) >= min(lengths):
        text = f"must be axes of a patch, which are {', '.join(map(str, range(min(lengths))))}"
    else:
        return
    yield mistake(config, ("predictor", "mirror"), f"{text}, found {axes}")


def _volume_mistakes(config: ConfigDict) -> Iterator[Mistake]:
    """What does not go together with a validation of whole volumes."""
    loaders, trainer = config.get("loaders"), config.get("trainer")
    keys = ("whole_volumes", "every_epochs")
    for path, values in _in_phases(("loaders",), loaders):
        if path[1] != "val":
            text = "is for loaders.val; a test measures whole volumes where there is a section predictor"
            yield from (mistake(config, (*path, key), text) for key in keys if _at(values, key))
            continue
        is_own = {key: _at(values, key) is not None for key in keys}
        wish, every = (_at(values if is_own[key] else loaders, key) for key in keys)
        wish_path, every_path = ((*(path if is_own[key] else ("loaders",)), key) for key in keys)
        if wish == "mirrored" and not _at(config.get("predictor"), "mirror"):
            yield mistake(
                config, wish_path, "mirrored needs predictor.mirror, such as mirror: [0, 1, 2]; else write true"
            )
        if every is not None and not wish:
            yield mistake(config, every_path, "says how often whole volumes are measured; add whole_volumes: true")
        elif every is not None and _at(trainer, "validate_every_steps") is not None:
            text = "counts epochs, but trainer.validate_every_steps validates after steps; remove one of the two"
            yield mistake(config, every_path, f"{text} (without every_epochs, each validation is of whole volumes)")
        if wish and _at(trainer, "strategy") == "fsdp":
            text = "measures whole volumes, which a sharded model (strategy: fsdp) cannot; validate patches, and use "
            yield mistake(config, wish_path, f"{text}`dtrain test` after the training")


def _sums(config: ConfigDict) -> list[KeyPath]:
    """Where the loss, or a library's component within it, is asked to add its samples up.

    A component of the user's own within a loss may mean something else by `reduction: sum`.
    """
    top: list[KeyPath] = [("loss", "reduction")] if _at(config.get("loss"), "reduction") == "sum" else []
    loss = read(config).calls.get("loss")
    return top + (_sums_within(loss) if loss else [])


def _sums_within(call: Call) -> list[KeyPath]:
    found: list[KeyPath] = []
    for inner in call.components.values():
        with suppress(ConfigError):  # reported elsewhere
            if inner.arguments.get("reduction") == "sum" and inner.target.module.startswith(_LIBRARIES):
                found.append(inner.path_of("reduction"))
        found += _sums_within(inner)
    return found


def strategy_mistakes(config: ConfigDict, options: Any) -> list[Mistake]:
    """What cannot be combined with `trainer.strategy`; `options` may come from elsewhere than the config."""
    strategy = _at(options, "strategy")
    wrong: dict[KeyPath, str] = {}
    if strategy == "ddp" and _set_keys(options, "fsdp"):
        wrong["fsdp",] = "applies only with `trainer.strategy: fsdp`"
    if _at(_at(options, "ddp"), "static_graph") and (_at(options, "accumulate") or 1) > 1:
        why = "reduces wrong gradients together with `trainer.accumulate` (pytorch issue 143580)"
        wrong["ddp", "static_graph"] = f"{why}; remove one of the two"
    if strategy == "fsdp":
        if has_several(config.get("optimizer")):
            why = "fsdp trains a model as a whole, with one optimizer, and here are several"
            wrong["strategy",] = f"{why} ({', '.join(config.optimizer)}); possible: ddp"
        if _at(options, "sync_batchnorm"):
            wrong["sync_batchnorm",] = "has not been tried with a sharded model (strategy: fsdp)"
        if _at(options, "precision") == "fp16":
            why = "fp16 needs its gradients scaled, which is not possible with strategy: fsdp"
            wrong["precision",] = f"{why}; possible: bf16, fp32"
        fsdp = _at(options, "fsdp")
        if _at(fsdp, "param_dtype") == "bf16" and _at(options, "precision") == "fp32":
            wrong["fsdp", "param_dtype"] = "bf16 needs trainer.precision: bf16, in which the model then computes"
        possible = ("backend", "timeout_seconds", "broadcast_buffers")
        text = f"is an option of DistributedDataParallel; with strategy: fsdp possible: {', '.join(possible)}"
        wrong |= {("ddp", key): text for key in _set_keys(options, "ddp") if key not in possible}
    return [mistake(config, ("trainer", *path), text) for path, text in wrong.items()]


def _exclusive_mistakes(config: ConfigDict) -> Iterator[Mistake]:
    trainer = config.get("trainer")
    if _at(trainer, "swa") and _at(trainer, "ema_decay") is not None:
        yield mistake(config, ("trainer", "swa"), "cannot be combined with 'ema_decay': one average is kept")
    if _at(trainer, "cudnn_benchmark") and _at(trainer, "deterministic"):
        text = "cannot be combined with 'deterministic': what is fastest differs from start to start"
        yield mistake(config, ("trainer", "cudnn_benchmark"), text)


def _name_mistakes(config: ConfigDict) -> Iterator[Mistake]:
    """Names that MLflow, a log line or a file system could not hold, and an experiment whose folder would leave runs/.

    With a `checkpoint_dir` of its own an experiment names no folder, but the next config of the same name may lack it.
    """
    names: dict[KeyPath, Any] = {("experiment",): config.get("experiment"), ("run_name",): config.get("run_name")}
    names["trainer", "checkpoint_dir"] = _at(config.get("trainer"), "checkpoint_dir")
    for path, name in names.items():
        if isinstance(name, str) and (text := _name_mistake(str(path[-1]), name)):
            yield mistake(config, path, text)


def _name_mistake(key: str, name: str) -> str:
    longest = max((len(part.encode("utf-8", "replace")) for part in Path(name).parts), default=0)
    size = len(name.encode("utf-8", "replace"))
    if not name.isprintable():
        return f"must be one line of printable characters, found {shown(name)}"
    if key == "checkpoint_dir" and longest > MAX_NAME_BYTES:
        return f"must have at most {MAX_NAME_BYTES} bytes in each folder's name, found {shown(name)}"
    if key != "checkpoint_dir" and size > MAX_NAME_BYTES:
        return f"must have at most {MAX_NAME_BYTES} bytes, found {size}: {shown(name)}"
    if key == "experiment" and ".." in Path(name).parts:
        return f"must not contain '..': it names the run folder where there is no trainer.checkpoint_dir; {found(name)}"
    return ""


def _missing_mistakes(config: ConfigDict, purpose: str | None) -> Iterator[Mistake]:
    """What a training, a test or a prediction cannot do without."""
    loaders, trainer = config.get("loaders"), config.get("trainer")
    purpose = purpose or next((phase for phase in ("train", "predict", "test") if _at(loaders, phase)), "train")
    sections, phases = PURPOSES[purpose]
    if purpose == "test" and config.get("metrics") is None:
        sections = (*sections, "loss")
    has_own_loop = {"training_step", "evaluation_step"} <= own_loop(config)  # which may know their loss themselves
    for name in sections:
        needed = config.get(name) is None and not (name == "loss" and has_own_loop)
        if needed and (why := _why_needed(config, name)) is not None:
            yield mistake(config, (name,), f"missing, such as {name}: {REQUIRED[name]}{why}")
    if phases and is_mapping(loaders) and all(loaders.get(phase) is None for phase in phases):
        text = f"has no {' and no '.join(map(repr, phases))}, so there is nothing to {purpose}"
        yield mistake(config, ("loaders",), text + ("" if purpose == "predict" else " on"))
    if purpose == "predict" and _at(loaders, "predict") is None and len(_several(_at(loaders, "test"))) > 1:
        text = "holds several sets; name what is predicted: loaders.predict: {...}"
        yield mistake(config, ("loaders", "test"), text)
    no_limit = _at(trainer, "max_epochs") is None and _at(trainer, "max_steps") is None
    if purpose == "train" and no_limit and (trainer is None or is_mapping(trainer)):
        yield mistake(config, ("trainer",), "needs max_epochs or max_steps, such as max_epochs: 10")


def _deep_supervision_mistakes(config: ConfigDict) -> Iterator[Mistake]:
    """Outputs of several levels for a loss that looks at the first alone, so that the others would not be trained."""
    loss = read(config).calls.get("loss")
    if loss is None or _at(config.get("model"), "deep_supervision") is not True:
        return
    with suppress(ConfigError):  # reported elsewhere
        targets = [call.target for call in _with_inner(loss)]
        names = {target.name for target in targets}
        if targets[0].module.startswith(("torch.", "dtrain.")) and not names & {"DeepSupervision", "PIDNetLoss"}:
            text = f"gives several outputs in training, and {targets[0].name} looks at the first alone; wrap it"
            example = "loss: {name: DeepSupervision, loss: {name: ...}}"
            yield mistake(config, ("model", "deep_supervision"), f"{text}: {example}")


def _with_inner(call: Call) -> Iterator[Call]:
    """A call and all those among its arguments."""
    yield call
    for inner in call.components.values():
        yield from _with_inner(inner)


def _why_needed(config: ConfigDict, section: str) -> str | None:
    """Why a section may not be missing, '' where that is plain; None: it may, since the model may compute its loss.

    A model of these libraries that takes nothing but its input cannot, whatever the batch; another may need no target.
    """
    model = read(config).calls.get("model") if section == "loss" else None
    if model is None:
        return ""
    try:
        target = model.target
    except ConfigError:  # reported elsewhere
        return ""
    takes = SOURCE.method(target.module, target.name, "forward") if target.module.startswith(_PLAIN) else None
    if takes and not takes[1] and len(takes[0]) == 1:
        return f"; {target.name}.forward({takes[0][0].name}) takes no target, so it cannot compute a loss itself"
    return None


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _at(values: Any, key: str) -> Any:
    return values.get(key) if is_mapping(values) else None


def _set_keys(options: Any, key: str) -> list[str]:
    """The options of a strategy that are not null."""
    values = _at(options, key)
    return [key for key in values if values[key] is not None] if is_mapping(values) else []
