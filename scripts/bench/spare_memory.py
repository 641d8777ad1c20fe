"""What it costs to keep the newest steps in memory: the loop's wait, the processor's time, and how seldom 1 % allows.

    python scripts/bench/spare_memory.py [--millions 1 100] [--steps 20] [--batch-size 64]

One process on one core trains a model of that many parameters with AdamW, by the engine's own loop; each step is kept.
The step is timed without that. What is sealed behind the loop is waited for, so that its processor time is known.
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import dtrain
from dtrain.tracking import start_sender
from dtrain.trainer import Trainer

LAYERS = 10


class Timed(Trainer):
    """Times its own steps, and what keeping them takes."""

    def train_epoch(self) -> None:
        self.steps: list[tuple[float, float]] = []  # seconds by the clock, and of the processor
        self.kept: list[tuple[float, float, float]] = []
        self.began = time.perf_counter(), time.process_time()
        super().train_epoch()

    def keep_in_memory(self) -> None:
        """Seconds of the loop, then processor seconds of the copy and of what follows behind the loop."""
        began, processor = time.perf_counter(), time.process_time()
        super().keep_in_memory()
        waited, copied = time.perf_counter() - began, time.process_time() - processor
        assert self.parts.spare is not None
        self.parts.spare.wait()
        self.kept.append((waited, copied, time.process_time() - processor - copied))

    def learn(self, micro: Any) -> None:
        self.began = time.perf_counter(), time.process_time()
        super().learn(micro)

    def optimizer_step(self) -> None:
        super().optimizer_step()
        clock, processor = self.began
        self.steps.append((time.perf_counter() - clock, time.process_time() - processor))


def measured(millions: float, steps: int, batch_size: int) -> Timed:
    """A trainer that has done so many steps."""
    width = round((millions * 1e6 / LAYERS) ** 0.5)
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(LAYERS)))
    samples = torch.utils.data.TensorDataset(
        torch.randn(steps * batch_size, width), torch.randn(steps * batch_size, width)
    )
    with tempfile.TemporaryDirectory() as folder:
        config = {
            "device": "cpu", "loaders": {"batch_size": batch_size}, "loss": {"name": "MSELoss"},
            "optimizer": {"name": "AdamW", "lr": 1e-4}, "mlflow": {"tracking_uri": f"{folder}/mlruns"},
            "trainer": {"name": "spare_memory.Timed", "max_steps": steps, "spare_memory_every_steps": 1,
                        "checkpoint_dir": f"{folder}/run", "log_every_steps": 1000, "pictures": False},
        }  # fmt: skip
        trainer = dtrain.create_trainer(config, model=model, datasets={"train": samples})
        trainer.fit()
    return trainer  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, nargs="+", default=[1, 100])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    start_sender._sender_command = lambda *_: [sys.executable, "-c", ""]  # type: ignore[assignment]
    print(
        "parameters: step ms by the clock, processor | kept: loop waits ms, processor, processor behind it | N for 1 %"
    )
    for millions in options.millions:
        trainer = measured(millions, options.steps, options.batch_size)
        clock, processor = (statistics.median(column) for column in zip(*trainer.steps[2:], strict=True))
        waited, copied, behind = (statistics.median(column) for column in zip(*trainer.kept[2:], strict=True))
        every = [max(1, math.ceil(cost / 0.01)) for cost in (waited / clock, (copied + behind) / processor)]
        step, kept = (
            " ".join(f"{1e3 * each:.1f}" for each in row) for row in ((clock, processor), (waited, copied, behind))
        )
        print(f"{millions:g} M: {step} | {kept} | {every[0]} by the clock, {every[1]} by the processor", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
