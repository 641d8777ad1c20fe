"""The small files of a run folder: run.json, JSON in general, a journal's line; knows nothing of what they are for."""

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtrain.tracking.whole_file import read_json, write_json

JOURNAL = "metrics.jsonl"
RUN_FACTS = "run.json"
DELIVERY = "mlflow.json"  # the sender's memory: what MLflow has acknowledged
SENDER_LOG = "logs/sender.log"

_log = logging.getLogger(__name__)
_LOCK_SECONDS = 10.0
_DIED = "rank 0 died without a word"


def read_run(folder: Path) -> dict[str, Any]:
    """What run.json of a run folder holds; {} when there is none."""
    return read_json(Path(folder) / RUN_FACTS)


def update_run(folder: Path, *, when: Mapping[str, Any] | None = None, **changes: Any) -> bool:
    """Changes facts in run.json, one process at a time, whole or not at all.

    Args:
        folder: the run folder.
        when: do so only if these facts still hold.
        **changes: the facts and their new values, JSON types.

    Returns:
        whether it was done.

    Raises:
        OSError: the file cannot be written.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(Path(folder) / f".{RUN_FACTS}.lock", timeout=_LOCK_SECONDS)
    try:
        lock.acquire()
    except (Timeout, NotImplementedError) as error:  # some network disks have no locks; the write below is whole anyway
        _log.warning("%s is changed without its lock: %s", Path(folder) / RUN_FACTS, error)
    try:
        facts = read_run(folder)
        if when is not None and any(facts.get(key) != value for key, value in when.items()):
            return False
        write_json(Path(folder) / RUN_FACTS, {**facts, **changes}, durable=True)
        return True
    finally:
        lock.release()


def read_line(line: bytes) -> dict[str, Any]:
    """One line of the journal; {} when it is not a JSON object."""
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}


def take_up_journal(path: Path) -> tuple[int, dict[str, int]]:
    """Learns what an old journal holds, and cuts off a last line that was torn by a kill.

    Returns:
        how often the run was started, and the last step of each figure.
    """
    starts = whole = 0
    steps: dict[str, int] = {}
    if not path.exists():
        return starts, steps
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            entry = read_line(line)
            starts += entry.get("kind") == "start"
            if entry.get("kind") == "metrics":
                for key in entry["values"]:
                    steps[key] = max(entry["step"], steps.get(key, entry["step"]))
            if entry.get("kind") == "image":
                steps[entry["key"]] = entry["step"]
    if whole < path.stat().st_size:  # that figure was never acknowledged
        os.truncate(path, whole)
    return starts, steps


def close_run_of(folder: Path, pid: int) -> bool:
    """Writes into run.json how a rank 0 that is gone ended: as the journal's last line says, else FAILED.

    Returns:
        False when the run folder belongs to another process by now.
    """
    with (folder / JOURNAL).open("rb") as journal:
        journal.seek(max(0, os.fstat(journal.fileno()).st_size - 65536))
        whole = [line for line in journal if line.endswith(b"\n")]
    last = read_line(whole[-1]) if whole else {}
    status, reason = (last["status"], last["reason"]) if last.get("kind") == "end" else ("FAILED", _DIED)
    ended = round(time.time(), 3)
    update_run(folder, when={"pid": pid, "state": "RUNNING"}, state=status, reason=reason, ended=ended)
    return bool(read_run(folder).get("pid") == pid)


def lives(facts: Mapping[str, Any]) -> bool:
    """Whether the process that run.json names is there, and not another one with its number."""
    import psutil

    try:
        process = psutil.Process(facts["pid"])
        return bool(process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= facts["attempt_started"])
    except psutil.NoSuchProcess:
        return False
