"""One measurement of volumes.py in a process of its own: python volumes_worker.py PROGRAM PART CONFIG COUNT OUT.

Both programs do the same work with the same file of pytorch-3dunet's format, and use their own loaders, training loop
and predictor for it. What was found is written to OUT as JSON.
"""

import itertools
import json
import os
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from clock import peak_mb
from torch.optim.optimizer import register_optimizer_step_post_hook

WARM_UP = 4  # batches or steps before the clock starts: workers start, files are read


def workers_seconds() -> float:
    """Processor time of all processes below this one, such as loader workers; not of dtrain's sender, which is no part
    of a step."""
    parents: dict[int, int] = {}
    seconds: dict[int, float] = {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            parents[int(path.name)] = int(fields[1])
            is_sender = b"dtrain.tracking" in (path / "cmdline").read_bytes()
            seconds[int(path.name)] = 0.0 if is_sender else sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
    own, found = {os.getpid()}, 0.0
    while own := {pid for pid, parent in parents.items() if parent in own}:
        found += sum(seconds[pid] for pid in own)
    return found


class Clock:
    """Wall clock and processor time from the end of the warm-up to the last tick: of this process, and its workers."""

    def __init__(self, count: int) -> None:
        self.ticks, self.last = 0, WARM_UP + count
        self.times: dict[int, tuple[float, float, float]] = {}

    def tick(self, *_: Any) -> None:
        """One batch or step more is done."""
        self.ticks += 1
        if self.ticks in (WARM_UP, self.last):
            self.times[self.ticks] = time.perf_counter(), time.process_time(), workers_seconds()

    def figures(self, samples_per_tick: int) -> dict[str, float]:
        """Samples per second, and processor time per sample: of this process, and with its workers."""
        pairs = zip(self.times[WARM_UP], self.times[self.last], strict=True)
        seconds, cpu, workers = (end - begin for begin, end in pairs)
        samples = (self.last - WARM_UP) * samples_per_tick
        return {
            "samples_per_s": samples / seconds,
            "cpu_ms": cpu / samples * 1e3,
            "all_cpu_ms": (cpu + workers) / samples * 1e3,
        }


def theirs(path: Path) -> dict[str, Any]:
    """The config as pytorch3dunet's own load_config makes it."""
    from pytorch3dunet.unet3d.config import TorchDevice

    config = yaml.safe_load(path.read_text())
    return config | {"device": TorchDevice(config["device"])}


def ours(path: Path) -> Any:
    """The config as dtrain's load_config makes it."""
    import dtrain

    return dtrain.load_config(path)


def their_batches(path: Path) -> Iterator[Any]:
    """Training batches, epoch after epoch."""
    from pytorch3dunet.datasets.utils import get_train_loaders

    loader = get_train_loaders(theirs(path))["train"]
    while True:
        yield from loader


def our_batches(path: Path) -> Iterator[Any]:
    """Training batches, epoch after epoch."""
    from dtrain.dataloader import get_train_loaders

    loader = get_train_loaders(ours(path), rank=0, world_size=1, seed=0).train
    for epoch in itertools.count():
        yield from loader.epoch(epoch)


def pipeline(batches: Callable[[Path], Iterator[Any]]) -> Callable[[Path, int], dict[str, float]]:
    """Samples per second of a loader alone."""

    def measure(path: Path, count: int) -> dict[str, float]:
        clock = Clock(count)
        for _ in itertools.islice(batches(path), clock.last):
            clock.tick()
        return clock.figures(yaml.safe_load(path.read_text())["loaders"]["batch_size"])

    return measure


def training(fit: Callable[[Path], None]) -> Callable[[Path, int], dict[str, float]]:
    """Samples per second of a whole training, from one optimizer step to the next; no validation in between."""

    def measure(path: Path, count: int) -> dict[str, float]:
        clock = Clock(count)
        register_optimizer_step_post_hook(clock.tick)
        fit(path)
        return clock.figures(yaml.safe_load(path.read_text())["loaders"]["batch_size"])

    return measure


def their_training(path: Path) -> None:
    """Train as train3dunet does. TensorBoard, which it needs, is left out in its favour."""
    board = types.ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = lambda **_: types.SimpleNamespace(add_scalar=lambda *_: None)  # type: ignore[attr-defined]
    sys.modules["torch.utils.tensorboard"] = board
    from pytorch3dunet.unet3d.trainer import create_trainer

    create_trainer(theirs(path)).fit()


def our_training(path: Path) -> None:
    """Train as `dtrain train` does, with journal, MLflow and checkpoint."""
    import dtrain

    dtrain.create_trainer(ours(path)).fit()


def prediction(begin: Callable[[Path], Callable[[], None]]) -> Callable[[Path, int], dict[str, float]]:
    """Patches of the input per second, from the reading of the input to the end of the output files."""

    def measure(path: Path, count: int) -> dict[str, float]:
        predict = begin(path)
        started = time.perf_counter(), time.process_time()
        predict()
        seconds, cpu_seconds = time.perf_counter() - started[0], time.process_time() - started[1]
        cpu_ms = cpu_seconds / count * 1e3
        return {"samples_per_s": count / seconds, "cpu_ms": cpu_ms, "all_cpu_ms": cpu_ms}

    return measure


def their_prediction(path: Path) -> Callable[[], None]:
    """Predict as predict3dunet does."""
    from pytorch3dunet.datasets.utils import get_test_loaders
    from pytorch3dunet.predict import get_predictor
    from pytorch3dunet.unet3d import utils
    from pytorch3dunet.unet3d.model import get_model

    config = theirs(path)
    model = get_model(config["model"])
    utils.load_checkpoint(config["model_path"], model)
    predictor = get_predictor(model, config)

    def predict() -> None:
        for loader in get_test_loaders(config):
            predictor(loader)

    return predict


def our_prediction(path: Path) -> Callable[[], None]:
    """Predict as `dtrain predict` does."""
    from dtrain.training.setup import create_trainer

    trainer = create_trainer(ours(path), purpose="predict")

    def predict() -> None:
        trainer.predict()

    return predict


PARTS: dict[tuple[str, str], Callable[[Path, int], dict[str, float]]] = {
    ("pytorch3dunet", "pipeline"): pipeline(their_batches),
    ("dtrain", "pipeline"): pipeline(our_batches),
    ("pytorch3dunet", "training"): training(their_training),
    ("dtrain", "training"): training(our_training),
    ("pytorch3dunet", "prediction"): prediction(their_prediction),
    ("dtrain", "prediction"): prediction(our_prediction),
}


def main() -> None:
    """Measure one part of one program."""
    program, part, path, count, out = sys.argv[1:]
    figures = PARTS[program, part](Path(path), int(count))
    Path(out).write_text(json.dumps(figures | {"peak_mb": peak_mb("self")}))


if __name__ == "__main__":  # loader workers that are spawned import this file
    main()
