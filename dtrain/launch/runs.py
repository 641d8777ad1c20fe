"""dtrain runs: the recent trainings, from run folders or from MLflow, with how far they are and what they reached."""

import json
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from dtrain.config.did_you_mean import did_you_mean
from dtrain.config.errors import ConfigError, one_line
from dtrain.distributed.exit_status import DONE
from dtrain.reporting.number_text import duration_text, figure_text
from dtrain.tracking.run_folder import RunFolder
from dtrain.tracking.run_record import (
    RunRecord,
    best_of,
    is_run_folder,
    last_lines,
    read_journal,
    run_folders,
    true_facts,
)
from dtrain.tracking.secrets import redact

_GAP = "  "
_LEAST_NAME, _LEAST_NOTE = 12, 16  # letters that are left of a name, or of a note, where the terminal is narrow


class Row(NamedTuple):
    """One run of the list."""

    name: str
    facts: Mapping[str, Any]
    step: int | None  # of the last figure
    best: tuple[int, float] | None  # step and value of what is monitored
    figures: Mapping[str, float]  # the last one of each
    left_seconds: float | None = None  # of one that is running

    @property
    def state(self) -> str:
        """FINISHED, FAILED, KILLED or RUNNING."""
        return str(self.facts.get("state") or "unknown")

    @property
    def seconds(self) -> float | None:
        """From its first start to its end; until now where it is running."""
        started, ended = self.facts.get("started"), self.facts.get("ended")
        if started is None or (ended is None and self.state != "RUNNING"):
            return None
        return float(ended or time.time()) - float(started)


def list_runs(folder: str | None, uri: str | None, most: int, as_json: bool) -> int:
    """Print the runs that began last, newest first.

    Raises:
        ConfigError: There is no such folder or store, or MLflow does not answer.
    """
    rows = _of_mlflow(uri, most) if uri is not None else _of_folders(Path(folder or "."))
    rows.sort(key=lambda row: float(row.facts.get("started") or 0), reverse=True)
    shown = rows[:most]
    if as_json:
        print(json.dumps([_as_object(row) for row in shown], indent=1))
        return DONE
    if not rows:
        where = f"in {redact(uri)}" if uri is not None else f"in and under {Path(folder or '.').resolve()}"
        print(f"no runs {where}; dtrain runs DIR looks elsewhere, dtrain runs --tracking-uri URI asks MLflow")
        return DONE
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print("\n".join(table(shown, width)))
    if len(rows) > len(shown):
        print(f"and {len(rows) - len(shown)} older ones: --limit {len(rows)}")
    return DONE


def _of_folders(top: Path) -> list[Row]:
    if not top.is_dir():
        known = [path.name for path in top.parent.iterdir() if path.is_dir()] if top.parent.is_dir() else []
        raise ConfigError(f"dtrain runs: {top} is not a folder{did_you_mean(top.name, known)}")
    return [_of_folder(folder, top) for folder in run_folders(top)]


def _of_folder(folder: Path, top: Path) -> Row:
    record = RunRecord(str(folder), folder, given=true_facts(folder))
    lines = [entry for entry in last_lines(folder) if entry.get("kind") == "metrics"]
    values = read_journal(folder, record.monitor).figures.get(record.monitor, {})
    figures = {key: float(value) for entry in lines for key, value in entry["values"].items()}
    steps = [(int(entry["step"]), float(entry["time"])) for entry in lines]
    left = _left_seconds(record.facts, steps) if record.facts.get("state") == "RUNNING" else None
    best, step = best_of(values, record.mode), steps[-1][0] if steps else None
    name = str(folder) if folder != Path() else folder.resolve().name
    return Row(name, {**record.facts, "monitor": record.monitor, "folder": str(folder)}, step, best, figures, left)


def _left_seconds(facts: Mapping[str, Any], steps: Sequence[tuple[int, float]]) -> float | None:
    """Until the last step, at the pace of the steps that were logged last in this start."""
    steps = [pair for pair in steps if pair[1] >= float(facts.get("attempt_started") or 0)]
    total = facts.get("steps")
    if not total or len(steps) < 2 or steps[-1][0] <= steps[0][0]:
        return None
    (first, began), (last, ended) = steps[0], steps[-1]
    return max(0.0, (int(total) - last) * (ended - began) / (last - first))


def _of_mlflow(uri: str, most: int) -> list[Row]:
    from dtrain.tracking.fetch_run import recent

    try:
        found = recent(uri, most)
    except (LookupError, ValueError) as error:
        raise ConfigError(f"dtrain runs: {error}") from None
    return [
        Row(record.name, {"monitor": record.monitor, **record.facts}, step, best_of(values, record.mode), figures)
        for record, step, values, figures in found
    ]


def progress_text(facts: Mapping[str, Any], step: int | None) -> str:
    """How far a run is: 'epoch 2/3' at an epoch's end, else 'step 14/30'; of unknown length 'step 14'."""
    if step is None:
        return "step 0"
    total, per_epoch = (int(facts.get(key) or 0) for key in ("steps", "steps_per_epoch"))
    if per_epoch and facts.get("max_epochs") and step % per_epoch == 0 and total % per_epoch == 0:
        return f"epoch {step // per_epoch:,}/{max(total, step) // per_epoch:,}"
    return f"step {step:,}" + (f"/{max(total, step):,}" if total else "")


def table(rows: Sequence[Row], width: int | None) -> list[str]:
    """The rows as lines; not wider than `width`, for which names and notes are cut."""
    cells = [("run", "started", "status", "progress", "best", "time", "")]
    for row in rows:
        monitor = str(row.facts.get("monitor", ""))
        best = f"{monitor.removeprefix('val/')} {figure_text(row.best[1])}" if row.best else ""
        taken = "" if row.seconds is None else duration_text(row.seconds)
        progress = progress_text(row.facts, row.step)
        cells.append((one_line(row.name), _when(row.facts), row.state, progress, best, taken, _note(row)))
    widths = [max(len(line[column]) for line in cells) for column in range(7)]
    if width is not None:
        _fit(widths, width)
    return [_GAP.join(_fitted(line, widths)).rstrip() for line in cells]


def _fitted(line: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    """The cells of a line in their widths; a name that is cut keeps its end, which tells runs apart."""
    for column, (text, size) in enumerate(zip(line, widths, strict=True)):
        cut = text[:size] if column else f"…{text[len(text) - size + 1 :]}"
        yield (text if len(text) <= size else cut).ljust(size)


def _fit(widths: list[int], width: int) -> None:
    """Narrow the note (the last column), then the name (the first), until a line fits; else without notes."""
    for least_note in (_LEAST_NOTE, 0):
        tried = list(widths)
        for column, least in ((-1, least_note), (0, _LEAST_NAME)):
            gaps = len(_GAP) * (sum(1 for size in tried if size) - 1)
            tried[column] = min(tried[column], max(least, tried[column] - (sum(tried) + gaps - width)))
        if sum(tried) + gaps <= width:
            break
    widths[:] = tried


def _when(facts: Mapping[str, Any]) -> str:
    started = facts.get("started")
    if started is None:
        return ""
    moment = datetime.fromtimestamp(float(started))
    return moment.strftime("%m-%d %H:%M" if moment.year == datetime.now().year else "%Y-%m-%d")


def _note(row: Row) -> str:
    if row.state == "RUNNING":
        return "" if row.left_seconds is None else f"{duration_text(row.left_seconds)} left"
    return one_line(str(row.facts.get("reason") or ""))


def _as_object(row: Row) -> dict[str, Any]:
    """What a program reads; a key that is not known is null."""
    facts = row.facts
    keys = ("folder", "run_id", "experiment", "run_name", "state", "reason", "host", "world_size", "attempt")
    known: dict[str, Any] = {"name": row.name, **{key: facts.get(key) for key in keys}}
    known |= {key: _iso(facts.get(key)) for key in ("started", "ended")}
    known |= {"seconds": row.seconds, "step": row.step, "steps": facts.get("steps"), "epoch": None}
    if row.step is not None and facts.get("steps_per_epoch"):
        known["epoch"] = row.step // int(facts["steps_per_epoch"])
    known |= {"max_epochs": facts.get("max_epochs"), "monitor": facts.get("monitor") or None}
    known["best"] = {"step": row.best[0], "value": _plain(row.best[1])} if row.best else None
    known |= {"left_seconds": row.left_seconds, "figures": {key: _plain(value) for key, value in row.figures.items()}}
    return known


def _plain(value: float) -> float | str:
    """JSON has no NaN and no infinity."""
    return value if abs(value) < float("inf") else str(value)


def _iso(seconds: Any) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(float(seconds)).astimezone().isoformat()


def records_of(
    runs: Iterable[str], uri: str | None, command: str, fetched: Path, images: bool = True
) -> list[RunRecord]:
    """The runs that are named: run folders, or runs in MLflow by id, whose files are fetched into a folder.

    Raises:
        ConfigError: With all that are neither.
    """
    found, wrong = [], []
    for run in runs:
        try:
            found.append(_record_of(run, uri, fetched, images))
        except (LookupError, ValueError) as error:
            wrong.append(ConfigError(f"dtrain {command}: {error}").mistakes[0])
    if wrong:
        raise ConfigError(wrong)
    return found


def _record_of(run: str, uri: str | None, fetched: Path, images: bool) -> RunRecord:
    folder = Path(run)
    if folder.is_dir():
        if is_run_folder(folder):
            return RunRecord(run.rstrip("/"), folder)
        inside = [str(path) for path in run_folders(folder)][:3]
        hint = f"; in it there are {', '.join(inside)}" if inside else ""
        raise LookupError(f"{run} is not a run folder: it has no {RunFolder(folder).run.name}{hint}")
    if len(run) == 32 and not set(run) - set("0123456789abcdef"):
        from dtrain.tracking.fetch_run import fetch

        return fetch(run, uri, fetched / run, images)
    known = [str(path) for path in run_folders(Path())]
    raise LookupError(f"{run!r} is neither a run folder nor the id of a run in MLflow{did_you_mean(run, known)}")
