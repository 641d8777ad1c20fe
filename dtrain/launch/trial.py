"""One training of a sweep: its config, its run folder, and what has become of it."""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ml_collections import ConfigDict

from dtrain.config.check import check
from dtrain.config.difference import changes
from dtrain.config.errors import ConfigError
from dtrain.config.load import load_config
from dtrain.launch.sweep_values import Draw
from dtrain.tracking.run_folder import RunFolder, read_line, read_run
from dtrain.tracking.whole_file import read_json

MAX_NAME_BYTES = 150  # of a trial, which is a folder


@dataclass
class Trial:
    """One training of a sweep.

    Attributes:
        status: '' as long as it waits, then running, finished, finished before, pruned, stopped early or failed.
        score: The figure that is monitored, of the best checkpoint.
    """

    name: str  # of its folder: fold=0,lr=0.001
    folder: Path
    overrides: list[str]
    values: Mapping[str, str]  # of the keys that are swept
    config: ConfigDict = field(repr=False)
    status: str = ""
    score: float | None = None

    @property
    def is_finished(self) -> bool:
        """Whether its folder holds this very training, at its end."""
        saved = RunFolder(self.folder).config
        facts = read_run(self.folder)
        if facts.get("state") != "FINISHED" or not saved.is_file():
            return False
        try:
            return not differs(saved, self.config, facts.get("world_size") or 1)
        except ConfigError:  # of an older dtrain: the training itself says what is wrong
            return False

    @property
    def best_score(self) -> float | None:
        """Of the best checkpoint in its folder."""
        value = read_json(RunFolder(self.folder).checkpoints / "best" / "manifest.json").get("score")
        return None if value is None or not math.isfinite(float(value)) else float(value)


def differs(saved: Path, config: ConfigDict, ranks: int = 1) -> list[str]:
    """In what a config that was saved describes another training, or one of another length."""
    found = changes(load_config(saved), config, ranks, ranks)
    return [str(item) for item in found if not item.is_free or str(item.path[-1]).startswith("max_")]


@dataclass
class Plan:
    """What a sweep trains: one config with several values for some keys."""

    path: str
    fixed: Sequence[str]  # overrides of all trials
    swept: Mapping[str, list[str] | Draw]
    base: ConfigDict  # with the overrides of all trials
    folder: Path  # in which each trial has its own

    @property
    def draws(self) -> bool:
        """Whether values are not all tried, but drawn."""
        return any(isinstance(values, Draw) for values in self.swept.values())

    @property
    def own_folder(self) -> Path:
        """Where the sweep itself writes: a run folder without checkpoints, for MLflow's parent run."""
        return self.folder / "sweep"

    def trial(self, values: Mapping[str, str], number: int | None = None, has_run: bool = False) -> Trial:
        """The trial with these values, numbered where they are drawn; of one that has run the config is not read.

        Raises:
            ConfigError: With all mistakes in its config.
        """
        short = {key: key.rpartition(".")[2] for key in self.swept}
        labels = short if len(set(short.values())) == len(short) else {key: key for key in self.swept}
        parts = [f"{labels[key]}={_as_name(self._short(key, value))}" for key, value in values.items()]
        name = ",".join([*([] if number is None else [f"trial={number}"]), *parts])
        name = name.encode()[:MAX_NAME_BYTES].decode(errors="ignore")
        run_name = self.base.get("run_name") or self.base.get("experiment")
        own = [*self.overrides_of(values), f"run_name={json.dumps(f'{run_name}-{name}')}"]
        own.append(f"trainer.checkpoint_dir={json.dumps(str(self.folder / name))}")
        if mirror := (self.base.get("trainer") or {}).get("mirror_to"):  # each trial is a training of its own
            own.append(f"trainer.mirror_to={json.dumps(f'{mirror}/{name}')}")
        config = self.base if has_run else load_config(self.path, own)
        if not has_run:
            check(config, "train")
        return Trial(name, self.folder / name, own, values, config)

    def overrides_of(self, values: Mapping[str, str]) -> list[str]:
        """What makes the trial's config of the file, but for its own place."""
        no_sweep = ["sweep=null"] if self.base.get("sweep") else []
        fixed = [word for word in self.fixed if not word.startswith("sweep.")]
        return [*fixed, *(f"{key}={value}" for key, value in values.items()), *no_sweep]

    def _short(self, key: str, value: str) -> str:
        """A drawn number with four digits."""
        wanted = self.swept[key]
        return f"{float(value):.4g}" if isinstance(wanted, Draw) and not wanted.is_integer else value


def _as_name(value: str) -> str:
    """A value as a part of a folder's name."""
    name = re.sub(r"[^\w.+=-]+", "-", value.strip()).strip("-") or "empty"
    return name.encode()[:MAX_NAME_BYTES].decode(errors="ignore")


class Figures:
    """One figure in a trial's journal, as that grows."""

    def __init__(self, folder: Path, figure: str) -> None:
        self._path, self._key = RunFolder(folder).journal, figure
        self._offset = 0
        self.values: list[float] = []  # one for each validation
        self.reported = 0  # of them, to whoever prunes

    def read(self) -> None:
        """Reads what is new. A journal that was replaced is read from its start."""
        try:
            with self._path.open("rb") as journal:
                if os.fstat(journal.fileno()).st_size < self._offset:
                    self._offset, self.values = 0, []
                journal.seek(self._offset)
                while (line := journal.readline()).endswith(b"\n"):
                    self._offset += len(line)
                    figures = read_line(line).get("values") if line.startswith(b'{"kind": "metrics"') else None
                    if figures and self._key in figures:
                        self.values.append(float(figures[self._key]))
        except FileNotFoundError:  # it has not begun
            return
