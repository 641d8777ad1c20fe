"""What programs read of a run with --json: one JSON object per line on stdout, everything else on stderr."""

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtrain.reporting.progress import Progress, SafeStream

OUTPUT = "DTRAIN_OUTPUT"  # in the environment, so that ranks have it, too: json, quiet, both in this order or nothing
_STATUS = {0: "FINISHED", 75: "KILLED", 130: "KILLED"}  # by exit status; of any other: FAILED
_ending: dict[str, Any] = {}  # what the last event is to say
_stdout: list[SafeStream] = []  # the true one, while events are written there


def take_stdout(speaks: bool) -> None:
    """From now on stdout is for events alone: what anything else prints there, native code included, is on stderr.

    Of several ranks one speaks.
    """
    sys.stdout.flush()
    if speaks:
        _stdout.append(SafeStream(os.fdopen(os.dup(1), "w", encoding="utf-8")))
    os.dup2(2, 1)


def write_event(event: str, **fields: Any) -> None:
    """One line, out before anything else happens; what JSON has no number for is a text, as in the journal."""
    if _stdout:
        line = json.dumps({"event": event, "time": round(time.time(), 3), **fields}, default=str)
        _stdout[-1].write(line + "\n")
        _stdout[-1].flush()


def note_ending(**fields: Any) -> None:
    """What the last event is to say, unless something said before is there already."""
    _ending.update({key: value for key, value in fields.items() if key not in _ending})


def pass_on(line: str) -> bool:
    """Of ranks that a launcher watches: shows an event of theirs, the last one at the launcher's own end.

    Returns whether the line is one.
    """
    if not _stdout or not line.startswith('{"event": '):
        return False
    if line.startswith('{"event": "end"'):
        _ending.clear()
        _ending.update({key: value for key, value in json.loads(line).items() if key not in ("event", "time")})
    else:
        _stdout[-1].write(line + "\n")
        _stdout[-1].flush()
    return True


def end(exit_status: int) -> None:
    """The last event, and stdout as it was."""
    if _stdout:
        status = _STATUS.get(exit_status, "FAILED")
        if exit_status in (0, 75):
            status = _ending.get("status") or status
        certain = {"status": status, "exit_status": exit_status}
        write_event("end", **{**certain, "reason": "", **_ending, **certain})
        _ending.clear()
        sys.stdout.flush()
        _stdout.pop()


class EventProgress(Progress):
    """Events on stdout, and on stderr the lines that a log has, unless it is to be quiet."""

    def __init__(self, is_quiet: bool = False) -> None:
        super().__init__(*([] if is_quiet else [sys.stderr]))

    def begin(self, facts: Mapping[str, str], monitor: str = "") -> None:
        """The event start."""
        super().begin(facts, monitor)
        write_event("start", run_folder=facts.get("run folder", ""), monitor=monitor, facts=dict(facts))

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """The event figures: of the training, at each log step."""
        super().figures(step, figures)
        write_event("figures", step=step, epoch=self._clock.epoch, figures=_plain(figures))

    def evaluation(self, phase: str, step: int | None, figures: Mapping[str, float], best: bool = False) -> None:
        """The event validation, or test."""
        super().evaluation(phase, step, figures, best)
        prefixed = {name if name.startswith(f"{phase}/") else f"{phase}/{name}": one for name, one in figures.items()}
        event = "validation" if phase == "val" else phase
        write_event(event, step=step, figures=_plain(prefixed), **({"best": best} if phase == "val" else {}))

    def saved(self, step: int, path: Path) -> None:
        """The event checkpoint: it is on the disk, whole."""
        write_event("checkpoint", step=step, path=str(path))

    def ended(self, **fields: Any) -> None:
        """For the event end."""
        note_ending(**{key: _plain(value) if isinstance(value, dict) else value for key, value in fields.items()})


def _plain(figures: Mapping[str, Any]) -> dict[str, float | str]:
    values = {name: float(value) for name, value in figures.items()}
    return {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
