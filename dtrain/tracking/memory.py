"""What a sender remembers of the run that it feeds, from one life to the next: the run folder's mlflow.json."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtrain.tracking.whole_file import read_json, write_json


@dataclass
class Memory:
    """What MLflow has acknowledged. Losing it costs a replay, which adds no rows."""

    path: Path
    run_id: str = ""  # the run that the rest is about
    offset: int = 0  # in bytes, in the journal
    status: str = ""  # RUNNING, FINISHED, FAILED or KILLED, as MLflow has it
    # Not sent yet: of a file its path in the run folder and its folder in MLflow; of a picture its path, key, step and
    # time in ms.
    artifacts: list[list[Any]] = field(default_factory=list)
    problem: str = ""  # why MLflow does not have everything: for the hint that rank 0 prints
    note: str = ""  # what else rank 0 should print

    @classmethod
    def read(cls, path: Path) -> "Memory":
        """Reads it back, without the problem and the note of an earlier time."""
        known = read_json(path)
        return cls(path, **{key: known[key] for key in ("run_id", "offset", "status", "artifacts") if key in known})

    def save(self) -> None:
        """Writes it, whole or not at all."""
        write_json(self.path, {key: value for key, value in vars(self).items() if key != "path"})
