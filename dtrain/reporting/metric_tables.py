"""Confusion matrices that metrics give: a CSV file and a picture of each, instead of a figure for each cell."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dtrain.reporting.classification_errors import confusion_matrix
from dtrain.reporting.png_drawing import matrix, png
from dtrain.tracking.run_folder import RunFolder
from dtrain.tracking.whole_file import write_bytes, write_text

Table = Sequence[Sequence[float]]
_MOST_PRINTED = 12  # classes that fit on a line


def keep_tables(tables: Mapping[str, Table], kind: str, folder: Path, journal: Any) -> None:
    """Write each table (K, K) of an evaluation such as `val/`, in place of an older one's, and have it sent."""
    files = RunFolder(folder)
    for name, table in tables.items():
        path = files.tables / f"{kind}{name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, _csv(table))
        relative = path.relative_to(folder)
        journal.artifact(str(relative), str(relative.parent))


def draw_tables(tables: Mapping[str, Table], kind: str, step: int, folder: Path, journal: Any) -> None:
    """Draw each table of an evaluation, as one of a sequence of pictures under its name."""
    for name, table in tables.items():
        file = f"{kind.removeprefix('val/')}{name}.png".replace("/", "-")
        path = RunFolder(folder).pictures / f"step-{step:08d}" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, png(_drawn(f"{kind}{name}   step {step}", table), {"step": str(step), "counts": str(table)}))
        journal.image(str(path.relative_to(folder)), f"{kind}{name}", step)


def tell_tables(tables: Mapping[str, Table], kind: str, note: Callable[[str], Any]) -> None:
    """Print each table, where nothing is written; of many classes the file of a training says more."""
    for name, table in tables.items():
        if len(table) > _MOST_PRINTED:
            note(f"{kind}{name}: {len(table)} classes; a training writes its table to tables/ in the run folder")
            continue
        note(f"{kind}{name} (rows: true, columns: predicted)")
        for number, row in enumerate(table):
            note(f"  {number:>3}: " + " ".join(f"{value:>6.4g}" for value in row))


def _csv(table: Table) -> str:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["true", *(f"predicted {number}" for number in range(len(table)))])
    rows.writerows([number, *(f"{value:.10g}" for value in row)] for number, row in enumerate(table))
    return text.getvalue()


def _drawn(title: str, table: Table) -> Any:
    """A picture of counts; of shares, such as a normalised matrix has, in percent."""
    values = np.nan_to_num(np.asarray(table, dtype=float))
    shares = bool(values.size) and values.max() <= 1.0 and not np.array_equal(values, values.round())
    counts = np.rint(values * 100 if shares else values).astype(np.int64)
    pairs = {(int(row), int(column)): int(counts[row, column]) for row, column in np.argwhere(counts)}
    shown, names, note = confusion_matrix(pairs, len(table))
    return matrix(title, shown, names, [line for line in (note, "in percent" if shares else "") if line])
