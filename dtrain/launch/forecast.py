"""dtrain check's table: what a training will cost and where it would fail, before it waits in a queue."""

import math
import shutil
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dtrain.config.build import defaults
from dtrain.config.difference import changes, ranks_of_batch
from dtrain.config.errors import ConfigError, first_few, one_line, to_plain
from dtrain.config.load import load_config
from dtrain.data.samplers import BatchShard
from dtrain.dataloader import batch_size_of
from dtrain.distributed.environment import cores, environment
from dtrain.distributed.fsdp import launcher_strategy
from dtrain.launch import data_check
from dtrain.launch.doctor import Finding, mirror, store
from dtrain.launch.memory_forecast import (
    MOST_SAMPLES,
    FakeSteps,
    Held,
    NoForecastError,
    Step,
    first_step,
    held_by,
    largest_batch,
    peak_of,
    real_flops,
    real_step,
    resized,
)
from dtrain.launch.step_timing import Timing, timed
from dtrain.modelloader import parameter_count
from dtrain.reporting.number_text import count_text, duration_text
from dtrain.tracking.git_state import capture_code
from dtrain.tracking.run_folder import RunFolder, ranks_known, read_run
from dtrain.tracking.secrets import redact
from dtrain.trainer import Trainer
from dtrain.training.state import capture

USABLE = 0.9  # of a GPU's memory: CUDA's context, NCCL, what its allocator cannot use
LEAST_STARVING = 0.2  # share of a step that may wait for data,
LEAST_WAIT = 0.005  # unless it is no more than so many seconds
STORE_SECONDS = 45.0
BROKEN_SHOWN = 1000


class Asked(NamedTuple):
    """The options of `dtrain check`."""

    memory: int | None = None  # bytes of a GPU
    world_size: int | None = None  # ranks of the training to come
    all_data: bool = False


class World(NamedTuple):
    """The ranks of the training to come."""

    size: int
    per_rank: int | None  # samples of one rank's batch; None: a sampler decides
    steps: int  # per epoch
    total: int
    is_this: bool  # whether they are the ranks that check


def world_of(trainer: Trainer, config: ConfigDict, options: Mapping[str, Any], wanted: int | None) -> World:
    """Batch and steps of a training on so many ranks.

    Raises:
        ConfigError: The batch size does not fit them.
    """
    loader, now = trainer.train_loader, trainer.ranks.world_size
    size = wanted or now
    per_rank = None
    steps = loader.steps()
    if not isinstance(loader.shard, BatchShard):
        per_rank = batch_size_of(config, "train", size)
        steps = loader.steps_with(size, per_rank)
    elif size != now:
        steps = -(-steps * now // size)
    most_steps, epochs = options["max_steps"], options["max_epochs"]
    total = min(n for n in (most_steps, None if epochs is None else epochs * steps, 1 << 62) if n is not None)
    return World(size, per_rank, steps, int(total), size == now)


class Forecast:
    """Everything that is found, as rows of one table; made where the rehearsal has gone well. All ranks call it."""

    def __init__(
        self, trainer: Trainer, config: ConfigDict, asked: Asked, ask_store: Callable[[], list[Finding]]
    ) -> None:
        self.trainer, self.config, self.asked, self._ask_store = trainer, config, asked, ask_store
        self.options = defaults(config, "trainer")
        self.options["strategy"] = self.options["strategy"] or launcher_strategy() or "ddp"
        self.world = world_of(trainer, config, self.options, asked.world_size)
        self._looks: list[data_check.Looks] = []
        self._fakes: FakeSteps | None = None
        self._why_no_fakes = ""

    def findings(self) -> list[Finding]:
        """All rows: what is as it should be, then warnings, then what a training would fail of."""
        timing = timed(self.trainer, self.world.per_rank)
        bytes_on_disk = self._checkpoint_bytes()  # with all ranks
        if not self.trainer.ranks.is_main:
            return []
        parts: list[Callable[[], Iterator[Finding]]] = [
            self._model, lambda: self._time(timing), self._memory, self._unused, lambda: self._loader(timing),
            self._data, lambda: self._disk(bytes_on_disk), self._last_run, self._store,
        ]  # fmt: skip
        found: list[Finding] = []
        for part in parts:
            try:
                found += part()
            except Exception as error:  # a forecast that cannot be made must not hide the others
                name = getattr(part, "__name__", "forecast").strip("_").replace("_", " ")
                found.append(Finding(name, "warn", one_line(f"not known: {type(error).__name__}: {error}")))
        return sorted(found, key=lambda one: ("ok", "warn", "fail").index(one.status))

    # ------------------------------------------------------------------------------------------ model, time, memory

    def _fake_steps(self) -> FakeSteps | None:
        if self._fakes is None and not self._why_no_fakes:
            try:
                self._fakes = FakeSteps(self.trainer, self.config, self.options)
                self._fakes.flops()
            except NoForecastError as error:
                self._fakes, self._why_no_fakes = None, str(error)
        return self._fakes

    def _model(self) -> Iterator[Finding]:
        total, trained = parameter_count(self.trainer.module)
        text = f"{self.config.model.name}, {total:,} parameters" + (
            f", {trained:,} trained" if trained != total else ""
        )
        if fakes := self._fake_steps():
            forward, both = fakes.flops()
            per = max(1, fakes.samples)
            text += f"; FLOPs per sample: {_flops(forward / per)} forward, {_flops(both / per)} with backward"
        elif self._can_try():
            samples = sum(micro.samples for micro in first_step(self.trainer))
            text += f"; FLOPs per sample: {_flops(real_flops(self.trainer) / max(1, samples))} with backward"
        yield Finding("model", "ok", text)

    def _time(self, timing: Timing) -> Iterator[Finding]:
        world, device = self.world, self.trainer.device
        batch = f"{world.per_rank} x {world.size} rank(s)" if world.per_rank else f"{world.size} rank(s)"
        if self.options["accumulate"] > 1:
            batch += f" x {self.options['accumulate']} accumulated"
        in_all = f"{world.total:,} in all" if world.total < 1 << 60 else "without end"
        yield Finding("steps", "ok", f"{world.steps:,} per epoch, {in_all}; {batch}")
        parts = {"data": timing.data, "transfer": timing.transfer, "forward": timing.forward,
                 "backward": timing.backward, "optimizer": timing.optimizer}  # fmt: skip
        shares = ", ".join(f"{name} {_seconds(value)}" for name, value in parts.items() if value)
        where = "this GPU" if device.type == "cuda" else f"this CPU ({cores()} cores)"
        yield Finding("step time", "ok", f"{_seconds(timing.step)} for {timing.samples} samples on {where}: {shares}")
        validation = self._validation_seconds(timing)
        epoch = world.steps * timing.step + validation
        if world.total < 1 << 60:
            in_all = duration_text(world.total / world.steps * epoch)
            speed = "at this machine's speed" + ("" if world.size == 1 else "; what ranks exchange is not in it")
            text = f"{duration_text(epoch)} per epoch, {in_all} in all, {speed}"
            if validation:
                text += ", with a validation per epoch as fast as forward"
            yield Finding("duration", "ok", text)

    def _validation_seconds(self, timing: Timing) -> float:
        loaders: Any = self.trainer.loaders.of("val").values()
        samples = sum(loader.batch_sampler.size for loader in loaders)
        return samples / self.world.size * timing.forward / max(1, timing.samples)

    def _memory(self) -> Iterator[Finding]:
        held, options, world = held_by(self.trainer), self.options, self.world
        fakes = self._fake_steps()
        if fakes is not None:
            held = fakes.held(held)
            samples = world.per_rank if world.per_rank and fakes.can_resize() else fakes.samples
            step = fakes.step(samples)
            measured = self._on_this_cpu(fakes, step, held) + (
                "; the work space of LSTM, GRU and RNN layers is not in it" if fakes.has_rnn() else ""
            )
        elif self._can_try():
            step = real_step(self.trainer, None if world.is_this else world.per_rank)
            measured = f", counted in a step on this {self.trainer.device.type.upper()} ({self._why_no_fakes})"
        else:
            yield Finding("memory", "warn", f"not known: {self._why_no_fakes}")
            return
        peak = peak_of(step, held, world.size, options)
        parts = {"weights": peak.weights, "gradients": peak.gradients, "optimizer": peak.optimizer,
                 "averages": peak.averages, "exchange": peak.exchange, "activations": peak.activations}  # fmt: skip
        shown = ", ".join(f"{name} {_size(value)}" for name, value in parts.items() if value)
        precision = self.trainer.forward.precision
        how = f"{step.samples} samples per rank, {precision}, {options['strategy']}"
        limit = self._limit()
        is_too_large = limit is not None and peak.total > limit
        yield Finding(
            "memory", "fail" if is_too_large else "ok",
            f"peak {_size(peak.total)} per rank ({how}): {shown}{measured}{self._measured_on_gpu()}",
            "a smaller batch, activation_checkpointing, bf16 or fsdp" if is_too_large else "",
        )  # fmt: skip
        if limit is not None:
            yield self._largest(fakes, step, held, limit)

    def _can_try(self) -> bool:
        """Whether a step of this process can be taken without others."""
        return self.trainer.ranks.world_size == 1 and not self.trainer.ranks.strategy.is_sharded

    def _limit(self) -> int | None:
        """Bytes that a training may take; of this machine's GPU where none are asked for."""
        memory = self.asked.memory
        if memory is None and self.trainer.device.type == "cuda":
            import torch

            memory = torch.cuda.get_device_properties(self.trainer.device).total_memory
        return None if memory is None else int(USABLE * memory)

    def _on_this_cpu(self, fakes: FakeSteps, step: Step, held: Held) -> str:
        """What differs where there is no GPU: dropout's masks and attention take more."""
        if self.trainer.device.type != "cpu" or not fakes.knows_cpu:
            return ""
        on_gpu, on_cpu = self._peak(step, held), self._peak(fakes.step(step.samples, as_on_gpu=False), held)
        return f"; that is on a GPU, on a CPU {_size(on_cpu)}" if abs(on_cpu - on_gpu) > 0.02 * on_gpu else ""

    def _measured_on_gpu(self) -> str:
        if self.trainer.device.type != "cuda":
            return ""
        import torch

        return f"; measured here {_size(torch.cuda.max_memory_allocated(self.trainer.device))}"

    def _largest(self, fakes: FakeSteps | None, step: Step, held: Held, limit: int) -> Finding:
        total = _size(limit / USABLE)
        if fakes is not None and fakes.can_resize():
            most = largest_batch(lambda samples: self._peak(fakes.step(samples), held), step.samples, limit)
        elif fakes is None and step.samples > 1 and resized(self._first_batch(), step.samples, 1) is not None:
            half = real_step(self.trainer, step.samples // 2)
            one, other = self._peak(half, held), self._peak(step, held)
            slope = max(1.0, (other - one) / (step.samples - half.samples))
            most = max(0, step.samples + int((limit - other) / slope))
        else:
            return Finding("largest batch", "ok", f"not known for {total}: the batch's tensors do not show its samples")
        how = "about " if fakes is None else "at least " if most >= MOST_SAMPLES else ""
        text = f"{how}{most:,} samples per rank in {total}, of which {1 - USABLE:.0%} are left for CUDA"
        if most > (size := self.trainer.train_loader.shard.samples):
            text += f"; train has {size:,}"
        if not most:
            return Finding("largest batch", "fail", f"not even one sample fits in {total}", "fsdp, or a smaller model")
        return Finding("largest batch", "ok", text)

    def _first_batch(self) -> Any:
        from dtrain.dataloader import first_batch

        return first_batch(self.trainer.loaders)

    def _peak(self, step: Step, held: Held) -> int:
        return peak_of(step, held, self.world.size, self.options).total

    def _unused(self) -> Iterator[Finding]:
        fakes = self._fake_steps()
        if fakes is None and not self._can_try():
            return
        unused = (fakes.step(fakes.samples) if fakes else real_step(self.trainer)).unused
        if unused is None:
            return
        if not unused:
            yield Finding("unused parameters", "ok", "none: each one that is trained gets a gradient")
            return
        finds = (self.options["ddp"] or {}).get("find_unused_parameters")
        meets = self.world.size > 1 and self.options["strategy"] == "ddp" and not finds
        does = "DistributedDataParallel will stop at the second step" if meets else "they are never trained"
        text = f"{len(unused)} get no gradient: {first_few(list(unused), 5)}; {does}"
        cure = "" if finds else "freeze them (trainer.freeze), or trainer.ddp.find_unused_parameters=true"
        yield Finding("unused parameters", "fail" if meets else "warn", text, cure)

    # -------------------------------------------------------------------------------------------------------- data

    def _loader(self, timing: Timing) -> Iterator[Finding]:
        has = max(1, cores() // max(1, environment().local_world_size))
        yield loader_finding(timing, self.options["accumulate"], self.trainer.train_loader.loader.num_workers, has)

    def broken(self) -> list[Finding]:
        """Read all samples where that is asked for: a row for each that cannot be used. All ranks call it."""
        if not self.asked.all_data:
            return []
        rows: list[Finding] = []
        if self.trainer.ranks.is_main:
            self._looks = self._look()
            rows = [one for one in self._data() if one.status == "fail"]
        rows = self.trainer.ranks.broadcast(rows)
        return rows

    def _look(self) -> list[data_check.Looks]:
        keys = data_check.Keys(self.options["input_key"], self.options["target_key"])
        overfits = self.options["overfit_batches"] is not None
        looks = []
        for name, loader in self.trainer.loaders.by_name().items():
            if name == "predict" or (overfits and name != "train"):
                continue
            inner = getattr(loader, "loader", loader)
            if self.asked.all_data:
                seen = [*data_check.read_all(inner, keys)]
                looks.append(data_check.Looks(name, len(inner.dataset), seen, bool(inner.dataset.random)))
            else:
                looks.append(data_check.looked_at(name, inner.dataset, keys))
        return looks

    def _data(self) -> Iterator[Finding]:
        self._looks = self._looks or self._look()
        datasets = self.trainer.loaders.datasets()
        known = data_check.classes_of(self.trainer)
        yield from data_check.label_findings(self._looks, known, datasets, self.asked.all_data)
        yield from data_check.overlap_findings(self._looks, datasets)
        yield from self._broken()

    def _broken(self) -> Iterator[Finding]:
        datasets = self.trainer.loaders.datasets()
        broken = [(each.name, look) for each in self._looks for look in each.looks if look.problem]
        for name, look in broken[:BROKEN_SHOWN]:
            where = f"{name}: sample {look.number}{data_check.place_of(datasets[name], look.number)}"
            yield Finding("broken sample", "fail", f"{where}: {look.problem}")
        read = ", ".join(f"{each.name} {len(each.looks):,}" for each in self._looks)
        if broken:
            yield Finding("samples", "fail", f"{len(broken):,} are broken of those that were read ({read})",
                          "repair them, or leave them out by a collate_fn")  # fmt: skip
        elif self.asked.all_data:
            yield Finding("samples", "ok", f"all were read: {read}")

    # ------------------------------------------------------------------------------------------------- surroundings

    def _checkpoint_bytes(self) -> int:
        trainer = self.trainer
        kept = capture(trainer.state, trainer.trainables, trainer.ranks, trainer.parts.seed)
        return sum(map(_tensor_bytes, kept))

    def _disk(self, one: int) -> Iterator[Finding]:
        folder = self.trainer.parts.start.folder.absolute()
        existing = next(path for path in (folder, *folder.parents) if path.is_dir())
        free = shutil.disk_usage(existing).free
        last, best = self.options["keep_last"], self.options["keep_best"] if self.trainer.loaders.val else 0
        yield disk_finding(one, last, best, free, existing)

    def _last_run(self) -> Iterator[Finding]:
        start = self.trainer.parts.start
        run = read_run(start.folder)
        saved = RunFolder(start.folder).config
        if not run and not saved.is_file():
            yield Finding("last run", "ok", f"none in {start.folder}")
            return
        if start.busy:
            yield Finding("last run", "warn", start.busy, "another trainer.checkpoint_dir")
            return
        lines = [redact(str(change)) for change in self._changes(saved, run)] + self._code_changes(start.folder)
        differs = f"differs in {first_few(lines, 6, '; ')}" if lines else "nothing differs"
        begins = f"resumes from {start.checkpoint.name}" if start.checkpoint else "begins anew"
        text = f"{start.folder} is {run.get('state') or 'of unknown state'}; {differs}; {start.finished or begins}"
        yield Finding("last run", "ok", text)

    def _changes(self, saved: Path, run: Mapping[str, Any]) -> list[Any]:
        ranks = self.world.size
        known = ranks_known(run) or ranks
        try:
            before = load_config(saved)
            return changes(before, self.config, known, ranks_of_batch(before, self.config, known, ranks))
        except (ConfigError, OSError):  # of an older dtrain, or changed by hand
            return ["the config, which cannot be read any more"]

    def _code_changes(self, folder: Path) -> list[str]:
        """The commit, where both are known."""
        records = sorted(folder.glob("code/**/commit.txt"), key=lambda path: path.stat().st_mtime)
        with tempfile.TemporaryDirectory() as place:
            now = capture_code(Path(place)).get("mlflow.source.git.commit", "")
        before = records[-1].read_text().strip() if records else ""
        is_known = now and before and " " not in before
        return [f"commit: {before[:8]} -> {now[:8]}"] if is_known and now != before else []

    def _store(self) -> Iterator[Finding]:
        yield from self._ask_store()


def loader_finding(timing: Timing, accumulate: int, workers: int, has: int) -> Finding:
    """Whether samples are loaded as fast as the model takes them, and how many workers that needs, of `has` cores."""
    work, samples = timing.work / accumulate, max(1, timing.samples) / accumulate
    needed = max(1, math.ceil(timing.load / max(work, 1e-9) - 0.05))
    text = (
        f"one process loads a batch in {_seconds(timing.load)} ({count_text(samples / max(timing.load, 1e-9))} samples"
    )
    text += f"/s), the model takes {_seconds(work)} for it: {_workers(needed)}; num_workers is {workers}"
    if timing.data <= max(LEAST_STARVING * timing.step, LEAST_WAIT):
        return Finding("loader", "ok", text)
    most = min(needed, has)
    cure = f"loaders.num_workers={most}" if workers < most else "samples that load faster"
    cure += f" (this machine has {has} cores per rank)" if needed > has else ""
    return Finding("loader", "warn", f"{timing.data / timing.step:.0%} of a step waits for data; {text}", cure)


def disk_finding(one: int, last: int, best: int, free: int, where: Path) -> Finding:
    """Whether so many checkpoints of `one` bytes fit; a new one is there before an old one goes."""
    needed = one * (last + best + 1)
    text = f"{_size(one)} per checkpoint, {_size(needed)} for keep_last {last}, keep_best {best} and the one being "
    text += f"written; {_size(free)} free in {where}"
    status = "fail" if needed > free else "warn" if needed > 0.8 * free else "ok"
    cure = "" if status == "ok" else "another trainer.checkpoint_dir, or a smaller trainer.keep_last"
    return Finding("checkpoints", status, text, cure)


def asked_in_background(config: ConfigDict) -> Callable[[], list[Finding]]:
    """Ask whether MLflow and the mirror can be reached while the rest continues; what it returns waits for the answer.

    A training without MLflow is one all the same, so that this is a warning; without its mirror it does not begin.
    """
    found: list[Finding] = []
    plain = to_plain(config)
    uri, experiment = (config.get("mlflow") or {}).get("tracking_uri"), config.get("experiment") or "default"

    def ask() -> None:
        try:
            of_store = store(uri, experiment)
            status = "warn" if of_store.status == "fail" else of_store.status
            found.extend([of_store._replace(status=status), *mirror(plain)])
        except Exception as error:
            found.append(Finding("mlflow", "warn", one_line(f"{type(error).__name__}: {error}")))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()

    def answer() -> list[Finding]:
        thread.join(2 * STORE_SECONDS)
        return found or [Finding("mlflow", "warn", f"no answer within {STORE_SECONDS:.0f} s")]

    return answer


def lines(findings: list[Finding]) -> Iterator[str]:
    """The table, in columns; on a terminal no line is longer than it is wide."""
    width = max((len(one.probe) for one in findings), default=0)
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    for one in findings:
        text = "; ".join(one_line(part) for part in (one.found, one.cure) if part)
        head = f"{one.status:<5} {one.probe:<{width}}  "
        left = max(20, columns - len(head) - 1)
        yield head + (("\n" + " " * len(head)).join(textwrap.wrap(text, left)) if columns else text)


def _tensor_bytes(tree: Any) -> int:
    from torch.utils._pytree import tree_iter

    leaves = (leaf for leaf in tree_iter(tree) if hasattr(leaf, "element_size"))
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves)


def _size(count: float) -> str:
    unit, size = next((pair for pair in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if count >= pair[1]), ("B", 1.0))
    return f"{count / size:.3g} {unit}" if count / size < 999.5 else f"{count / size:,.0f} {unit}"


def _workers(needed: int) -> str:
    return "1 worker keeps up" if needed == 1 else f"{needed} workers keep up"


def _seconds(value: float) -> str:
    return f"{1e3 * value:.3g} ms" if value < 1 else duration_text(value)


def _flops(count: float) -> str:
    unit, size = next((pair for pair in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)) if count >= pair[1]), ("", 1))
    return f"{count / size:.3g}{unit}"
