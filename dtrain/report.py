"""What is said about a run before its first and after its last step; knows how to word it, not how to show it."""

import time
from collections.abc import Mapping
from pathlib import Path

import torch

from dtrain.modelloader import parameter_count
from dtrain.progress import duration_text


def model_line(name: str, module: torch.nn.Module) -> str:
    """'ViT, 68,946 parameters'."""
    total, trained = parameter_count(module)
    return f"{name}, {total:,} parameters" + (f" ({trained:,} trained)" if trained != total else "")


def data_line(sizes: Mapping[str, int]) -> str:
    """'train 1,257, val 270, test 270 samples'."""
    return ", ".join(f"{phase} {size:,}" for phase, size in sizes.items()) + " samples"


def summary(
    status: str, reason: str, best: str, figures: Mapping[str, float], seconds: float, steps: int, folder: Path
) -> dict[str, str]:
    """The table after the last step."""
    table = {"status": status + (f" ({reason})" if reason else ""), "steps": f"{steps:,} in {duration_text(seconds)}"}
    if status == "KILLED":
        table["to go on"] = "start the same command again"
    if best:
        table["best"] = best
    if figures:
        table["test"] = ", ".join(f"{name.removeprefix('test/')} {value:.4g}" for name, value in figures.items())
    return table | {"run folder": str(folder)}


def default_run_name(experiment: str) -> str:
    """The experiment and a time stamp."""
    return f"{experiment}-{time.strftime('%Y%m%d-%H%M%S')}"
