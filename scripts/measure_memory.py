"""The memory that `dtrain check` forecasts beside what the CPU's allocator gives out in a step: docs/check.md's table.

    python scripts/measure_memory.py configfiles/digits.yaml configfiles/pidnet_scene.yaml trainer.precision=bf16

Overrides hold for every config. The allocator's events are torch's profiler's, which sees what operators take for
themselves, too; what was there before the step (weights, optimizer, averages) is added.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from dtrain.config.build import defaults
from dtrain.config.load import load_config
from dtrain.launch.memory_forecast import FakeSteps, first_step, held_by, peak_of
from dtrain.trainer import Trainer, create_trainer


class Row(NamedTuple):
    """Bytes of one process at the peak of a step."""

    samples: int
    on_gpu: int  # forecast
    on_cpu: int  # forecast
    measured: int  # on this CPU


def compared(config: Any) -> Row:
    """Forecast and measure a training step of a config, the second one, with the optimizer's state."""
    options = defaults(config, "trainer")
    options["strategy"] = options["strategy"] or "ddp"
    trainer = create_trainer(config)
    trainer.model.train()
    trainer.finite_step.begin(trainer.trainables.all, trainer.trainables.loss_objects)
    take_step(trainer)
    held = held_by(trainer)
    forecasts = []
    for as_on_gpu in (True, False):
        fakes = FakeSteps(trainer, config, options, as_on_gpu)
        forecasts.append(peak_of(fakes.step(fakes.samples), fakes.held(held), 1, options).total)
    trainer.state.clear()
    measured = allocated_in(lambda: take_step(trainer))
    return Row(fakes.samples, *forecasts, measured + held.weights + held.optimizer + held.averages)


def take_step(trainer: Trainer) -> None:
    """One optimizer step, as the loop takes it."""
    for micro in first_step(trainer):
        trainer.learn(micro)
    trainer.take_step()


def allocated_in(work: Any) -> int:
    """The most bytes that the allocator of the CPU gave out meanwhile, less what it got back."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    now = most = 0
    for event in sorted((one for one in events if one.get("name") == "[memory]"), key=lambda one: one["ts"]):
        now += event["args"]["Bytes"] if event["args"]["Device Type"] == 0 else 0
        most = max(most, now)
    return most


def main(arguments: list[str]) -> None:
    """Print a table in Markdown."""
    files = [word for word in arguments if word.endswith((".yaml", ".yml"))]
    overrides = [word for word in arguments if word not in files]
    print(
        "| Config | Samples | Forecast, GPU | Forecast, CPU | Measured, CPU | Difference |\n|---|---|---|---|---|---|"
    )
    for file in files:
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            row = compared(load_config(file, ["device=cpu", f"trainer.checkpoint_dir={folder}/run", *overrides]))
        sizes = " | ".join(f"{size / 1e6:.1f} MB" for size in row[1:])
        print(f"| {Path(file).stem} | {row.samples} | {sizes} | {row.on_cpu / row.measured - 1:+.0%} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
