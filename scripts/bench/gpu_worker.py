"""One work of gpu.py in a process of its own: python gpu_worker.py WORK COMPILE DEVICE SCALE STEPS ROUNDS OUT.

The hand-written loop and dtrain train in turn, each round anew, in this one process: kernels are chosen and compiled
for both alike. What was found goes to OUT as JSON, for each round of each program.
"""

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_parts
import torch
from gpu_parts import Clock
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader

WARM_UP, TRACED = 20, 10
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class Work:
    """A model, and what it is trained on."""

    model: dict[str, Any]
    loss: dict[str, Any]
    dataset: str
    size: tuple[int, ...]
    batch_size: int
    workers: int = 4


WORKS = {
    ("unet3d", "full"): Work(
        {"name": "UNet3D", "in_channels": 1, "out_channels": 1, "f_maps": [32, 64, 128, 256]},
        {"name": "BCEDiceLoss"}, "Volumes", (64, 128, 128), 4,
    ),
    ("pidnet-s", "full"): Work(
        {"name": "PIDNetWrapper", "variant": "s", "num_classes": 19}, {"name": "PIDNetLoss"}, "Scenes", (1024, 1024), 12
    ),
    ("unet3d", "small"): Work(
        {"name": "UNet3D", "in_channels": 1, "out_channels": 1, "f_maps": [2, 4], "num_groups": 1},
        {"name": "BCEDiceLoss"}, "Volumes", (8, 8, 8), 2, 0,
    ),
    ("pidnet-s", "small"): Work(
        {"name": "PIDNetWrapper", "variant": "s", "num_classes": 19},
        {"name": "PIDNetLoss", "ohem": {"min_kept": 0.0625}}, "Scenes", (64, 64), 2, 0,
    ),
}  # fmt: skip


def made(kind: str, call: dict[str, Any]) -> Any:
    """A component without its engine."""
    from dtrain.components import losses, models

    found = getattr(models if kind == "model" else losses, call["name"])
    return found(**{key: value for key, value in call.items() if key != "name"})


@contextlib.contextmanager
def ticking(clock: Clock) -> Iterator[None]:
    """The clock ticks with each optimizer step."""
    handle = register_optimizer_step_post_hook(clock.tick)
    try:
        yield
    finally:
        handle.remove()


def moved(value: Any, device: str) -> Any:
    """To the device, on a GPU images and volumes in channels_last, without a wait."""
    if isinstance(value, torch.Tensor):
        memory_format = FORMATS.get(value.dim(), torch.preserve_format) if device == "cuda" else torch.preserve_format
        return value.to(device, non_blocking=True, memory_format=memory_format)
    return [moved(item, device) for item in value]


def by_hand(work: Work, compiles: bool, device: str, clock: Clock) -> None:
    """The loop that a researcher writes, with torch's own advice for speed."""
    torch.manual_seed(0)
    model = made("model", work.model).to(device)
    if device == "cuda":  # on a CPU, torch 2.13 crashes in the backward of UNet3D in this format
        model = model.to(memory_format=FORMATS[2 + len(work.size)])
    called = torch.compile(model) if compiles else model
    criterion = made("loss", work.loss).to(device)
    data = getattr(gpu_parts, work.dataset)(clock.end * work.batch_size, work.size)
    loader = DataLoader(
        data, work.batch_size, shuffle=True, num_workers=work.workers, pin_memory=device == "cuda", drop_last=True
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True if device == "cuda" else None)
    total = torch.zeros((), device=device)
    for step, batch in enumerate(loader, 1):
        inputs, target = moved(batch, device)
        with torch.autocast(device, torch.bfloat16):
            loss = criterion(called(inputs), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total += loss.detach()
        if step % 50 == 0:
            print(f"step {step} loss {total.item() / 50:.4f}")
            total.zero_()


def by_dtrain(work: Work, compiles: bool, device: str, clock: Clock) -> None:
    """The same by dtrain, with journal and checkpoint."""
    import dtrain

    samples = {"samples": clock.end * work.batch_size, "size": list(work.size)}
    config = {
        "experiment": "gpu", "modules": ["gpu_parts"], "device": device, "seed": 0,
        "model": work.model, "loss": work.loss, "optimizer": {"name": "AdamW", "lr": 1e-4},
        "loaders": {"name": work.dataset, "batch_size": work.batch_size, "num_workers": work.workers, "train": samples},
        "trainer": {
            "max_epochs": 1, "precision": "bf16", "channels_last": device == "cuda", "compile": compiles,
            "checkpoint_dir": "run", "resume": "none",
        },
    }  # fmt: skip
    dtrain.create_trainer(config).fit()


PROGRAMS = {"by hand": by_hand, "dtrain": by_dtrain}


def main() -> None:
    """Measure."""
    name, compiles, device, scale, steps, rounds, out = sys.argv[1:]
    torch.backends.cudnn.benchmark = True  # for both
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder, contextlib.chdir(folder):
        for number in range(int(rounds)):
            for program in list(PROGRAMS) if number % 2 == 0 else list(reversed(PROGRAMS)):
                clock = Clock(device, min(WARM_UP, int(steps)), int(steps), TRACED if device == "cuda" else 0)
                with ticking(clock):
                    PROGRAMS[program](WORKS[name, scale], compiles == "compile", device, clock)
                found.append({"program": program, "round": number, **clock.figures()})
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":  # loader workers that are spawned import this file
    main()
