"""What is said about a run before its first and after its last step; knows how to word it, not how to show it."""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dtrain.modelloader import parameter_count
from dtrain.reporting.text import duration_text

if TYPE_CHECKING:
    from dtrain.predict.inference import Result


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


def prediction(result: "Result") -> list[str]:
    """Lines after a prediction: the figures, where the files are, and how to go on."""
    lines = []
    for name, values in result.scores.items():
        known = [value for value in values if value == value]
        mean = sum(known) / len(known) if known else math.nan
        lines.append(f"{name}: {result.metric} {mean:.4f}; by class: " + ", ".join(f"{value:.4f}" for value in values))
    if result.stopped:
        return [*lines, "stopped; the same command goes on from here"]
    count = len(result.files)
    where = str(result.files[0]) if count == 1 else f"{count:,} files in {result.files[0].parent}"
    old = count - result.made
    return [*lines, f"predictions: {where}" + (f" ({old:,} of them from an earlier start)" if old else "")]


def default_run_name(experiment: str) -> str:
    """The experiment and a time stamp."""
    return f"{experiment}-{time.strftime('%Y%m%d-%H%M%S')}"
