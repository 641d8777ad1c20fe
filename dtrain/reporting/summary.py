"""What is said about a run before its first and after its last step, in words; `progress` shows it."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from dtrain.reporting.number_text import duration_text, folded


def model_line(name: str, total: int, trained: int) -> str:
    """'ViT, 68,946 parameters'; with how many of them are trained, unless all are."""
    return f"{name}, {total:,} parameters" + (f" ({trained:,} trained)" if trained != total else "")


def workers_line(workers: int) -> str:
    """What loads the training's samples."""
    return f"{workers} per rank" if workers else "none, each rank loads its own samples"


def summary_table(
    status: str, reason: str, best: str, figures: Mapping[str, float], seconds: float, steps: int, folder: Path
) -> dict[str, str]:
    """The table after the last step."""
    table = {"status": status + (f" ({reason})" if reason else ""), "steps": f"{steps:,} in {duration_text(seconds)}"}
    if status == "KILLED":
        table["to continue"] = "start the same command again"
    if best:
        table["best"] = best
    if figures:
        table["test"] = ", ".join(f"{name.removeprefix('test/')} {text}" for name, text in folded(figures).items())
    return table | {"run folder": str(folder)}


def prediction_lines(
    files: Sequence[Path], made: int, stopped: bool, scores: Mapping[str, Sequence[float]], metric: str
) -> list[str]:
    """Lines after a prediction: the scores by file and class, where the files are, and how to continue."""
    lines = []
    for name, values in scores.items():
        known = [value for value in values if not math.isnan(value)]
        mean = sum(known) / len(known) if known else math.nan
        lines.append(f"{name}: {metric} {mean:.4f}; by class: " + ", ".join(f"{value:.4f}" for value in values))
    if stopped:
        return [*lines, "stopped; the same command continues from here"]
    where = str(files[0]) if len(files) == 1 else f"{len(files):,} files in {files[0].parent}"
    earlier = len(files) - made
    return [*lines, f"predictions: {where}" + (f" ({earlier:,} of them from an earlier start)" if earlier else "")]
