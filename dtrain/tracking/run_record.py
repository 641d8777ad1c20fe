"""What a run has left, read back: from its run folder, or from what was fetched of it from MLflow."""

import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from dtrain.tracking.run_folder import RunFolder, is_dead, read_line, read_run
from dtrain.tracking.whole_file import read_json

Figures = dict[str, dict[int, float]]  # by key and step
GONE = "its process is gone, and left no word"
_OF_A_RUN = {"checkpoints", "config", "logs", "pictures", "predictions", "code", "failed-step", "weights"}  # folders
_NOT_SEARCHED = {"mlruns", "mlartifacts", "node_modules", "site-packages", "__pycache__"}
_MOST_FOLDERS = 20_000  # looked into in one search
_DEEPEST = 6  # under the folder where it begins
_TAIL_BYTES = 65536
_ENVIRONMENT = "environment.json"
_FIRST_LINES = 10  # of a journal, among which the params are


@dataclass(frozen=True)
class RunRecord:
    """One run.

    Attributes:
        name: How it is called on the screen: the folder as it was given, or the run's name in MLflow.
        folder: Where its files lie.
    """

    name: str
    folder: Path
    origin: str = ""  # where it is from, if not from its own folder: MLflow's run id
    given: Mapping[str, Any] = field(default_factory=dict)  # facts that are known without the folder

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Of run.json; of a run whose process is gone with the status that is true."""
        return dict(self.given) or true_facts(self.folder)

    @cached_property
    def journal(self) -> "JournalContent":
        """All that its journal says."""
        return read_journal(self.folder)

    @property
    def config_file(self) -> Path:
        """The resolved config."""
        return RunFolder(self.folder).config

    @property
    def code_folder(self) -> Path:
        """Of the last start, which code ran."""
        return RunFolder(self.folder).code(int(self.facts.get("attempt") or 1))

    def code_text(self, name: str) -> str:
        """A file of it, '' where there is none."""
        with suppress(OSError):
            return (self.code_folder / name).read_text(errors="replace")
        return ""

    @property
    def commit(self) -> str:
        """The commit that ran, '' where none is known."""
        text = self.code_text("commit.txt").strip()
        return text if re.fullmatch(r"[0-9a-f]{40,64}", text) else ""

    @property
    def environment(self) -> dict[str, Any]:
        """What environment.json of the last start says, else of the first one; {} where none was recorded."""
        attempt, home = int(self.facts.get("attempt") or 1), self.folder / "environment"
        return read_json(home / f"resume_{attempt}" / _ENVIRONMENT) or read_json(home / _ENVIRONMENT)

    @property
    def data(self) -> dict[str, Any]:
        """By set (train, val, ...) what is known of it: class, arguments, samples, digest."""
        known = {name: {"samples": count} for name, count in (self.facts.get("samples") or {}).items()}
        for name, told in self.journal.datasets.items():
            known[name] = {**known.get(name, {}), **told}
        for name, digest in (self.facts.get("digests") or {}).items():  # once MLflow has been told of them
            known[name] = {**known.get(name, {}), "digest": digest}
        return known

    @property
    def monitor(self) -> str:
        """The figure that 'best' means."""
        return str(self._of_trainer("monitor") or "val/loss")

    @property
    def mode(self) -> str:
        """Whether more of it is better: min or max."""
        return str(self._of_trainer("mode") or ("min" if self.monitor.endswith("loss") else "max"))

    def _of_trainer(self, key: str) -> Any:
        """As run.json has it; runs of an older dtrain have it among their params, if it was given."""
        return self.facts.get(key, self._params.get(f"trainer.{key}"))

    @cached_property
    def _params(self) -> dict[str, str]:
        with suppress(OSError), RunFolder(self.folder).journal.open("rb") as lines:
            for line in islice(lines, _FIRST_LINES):
                if line.startswith(b'{"kind": "params"'):
                    return dict(read_line(line).get("values", {}))
        return {}

    @property
    def seconds(self) -> float | None:
        """How long the run took from its first start on; until now where it is at work."""
        started, ended = self.facts.get("started"), self.facts.get("ended")
        if started is None:
            return None
        last = ended or (time.time() if self.facts.get("state") == "RUNNING" else last_time(self.folder) or started)
        return float(last) - float(started)

    @property
    def seconds_at_work(self) -> float | None:
        """The same without the time between its starts."""
        spans = [last - first for first, last in self.journal.spans]
        return sum(spans) if spans else self.seconds


@dataclass(frozen=True)
class JournalContent:
    """A journal's lines, put in order."""

    figures: Figures
    times: dict[int, float]  # by step: when its first figure was logged, in seconds since 1970
    images: dict[str, dict[int, str]]  # by key and step: the path in the run folder
    starts: list[dict[str, Any]]  # the facts of each
    spans: list[tuple[float, float]]  # of each start: its first and its last line's time
    tags: dict[str, str]
    datasets: dict[str, dict[str, Any]]  # by name, as the last start had them


def read_journal(folder: Path, key: str = "") -> JournalContent:
    """The journal of a run folder, of whose figures only `key` is wanted, if it is given.

    Where a training went back to a checkpoint and continued otherwise, what it had left behind no longer counts.
    """
    content = JournalContent({}, {}, {}, [], [], {}, {})
    wanted = json.dumps(key).encode() if key else b""
    with suppress(OSError), RunFolder(folder).journal.open("rb") as lines:
        for line in lines:
            if wanted in line or not line.startswith(b'{"kind": "metrics"'):
                _take(content, read_line(line), key)
    return content


def _take(content: JournalContent, entry: Mapping[str, Any], key: str) -> None:
    kind, moment = entry.get("kind"), float(entry.get("time") or 0.0)
    if kind == "start":
        _go_back(content, entry.get("from_step"))
        content.starts.append({**entry.get("facts", {}), "from_step": entry.get("from_step")})
        content.spans.append((moment, moment))
    elif content.spans:
        content.spans[-1] = (content.spans[-1][0], moment)
    if kind == "metrics":
        step = int(entry["step"])
        content.times.setdefault(step, moment)
        for name, value in entry.get("values", {}).items():
            if not key or name == key:
                content.figures.setdefault(name, {})[step] = float(value)
    elif kind == "image":
        content.images.setdefault(str(entry["key"]), {})[int(entry["step"])] = str(entry["path"])
    elif kind == "tags":
        content.tags.update(entry.get("values", {}))
    elif kind == "datasets":
        content.datasets.update(entry.get("values", {}))


def _go_back(content: JournalContent, step: int | None) -> None:
    if step is None:
        return
    series: list[dict[int, Any]] = [*content.figures.values(), *content.images.values(), content.times]
    for values in series:
        for later in [each for each in values if each > step]:
            del values[later]


def true_facts(folder: Path) -> dict[str, Any]:
    """What run.json says, except of a training that says RUNNING and is gone: FAILED, which nobody has written yet."""
    facts = read_run(folder)
    if facts.get("state") == "RUNNING" and "pid" in facts:
        with suppress(OSError):
            if is_dead(folder, facts):
                facts |= {"state": "FAILED", "reason": GONE, "ended": last_time(folder)}
    return facts


def last_lines(folder: Path) -> list[dict[str, Any]]:
    """The last whole lines of the journal, as many as lie in its last 64 KiB."""
    with suppress(OSError), RunFolder(folder).journal.open("rb") as journal:
        journal.seek(max(0, os.fstat(journal.fileno()).st_size - _TAIL_BYTES))
        return [entry for line in journal if line.endswith(b"\n") and (entry := read_line(line))]
    return []


def last_time(folder: Path) -> float | None:
    """When the journal was last written to."""
    lines = last_lines(folder)
    return float(lines[-1]["time"]) if lines and "time" in lines[-1] else None


def best_of(values: Mapping[int, float], mode: str) -> tuple[int, float] | None:
    """The step and the value that is best, the first one of equals; None without a number."""
    known = [(step, value) for step, value in sorted(values.items()) if not math.isnan(value)]
    if not known:
        return None
    return (max if mode == "max" else min)(known, key=lambda pair: pair[1])


def is_run_folder(folder: Path) -> bool:
    """Whether a training has begun there."""
    files = RunFolder(folder)
    return files.run.is_file() or files.journal.is_file()


def run_folders(top: Path) -> Iterator[Path]:
    """The run folders in and under a folder; of sweeps those of the trials, too. Links to folders are not followed."""
    for looked_into, (place, folders, files) in enumerate(os.walk(top)):
        is_run = "run.json" in files or "metrics.jsonl" in files
        if is_run:
            yield Path(place)
        if len(Path(place).relative_to(top).parts) >= _DEEPEST or looked_into >= _MOST_FOLDERS:
            folders.clear()
        skipped = _NOT_SEARCHED | (_OF_A_RUN if is_run else set())
        folders[:] = sorted(name for name in folders if name not in skipped and not name.startswith("."))
