"""dtrain sweep: trainings that differ in some keys, one after another, each in a run folder of its own."""

import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dtrain.config.check import check
from dtrain.config.difference import changes
from dtrain.config.errors import ConfigError, Mistake
from dtrain.config.load import load_config, run_folder
from dtrain.distributed.exit_status import DONE, FAILED, STOPPED_EARLY
from dtrain.distributed.process import end_with
from dtrain.distributed.stop_request import stop_signals
from dtrain.tracking.run_folder import RunFolder, read_run
from dtrain.tracking.whole_file import read_json

MOST = 1000  # trials of one sweep
MAX_NAME_BYTES = 150  # of a trial, which is a folder


@dataclass
class Trial:
    """One training of a sweep."""

    name: str  # of its folder: fold=0,lr=0.001
    folder: Path
    overrides: list[str]
    config: ConfigDict = field(repr=False)
    status: str = ""

    @property
    def is_finished(self) -> bool:
        """Whether its folder holds this very training, at its end."""
        saved = RunFolder(self.folder).config
        facts = read_run(self.folder)
        if facts.get("state") != "FINISHED" or not saved.is_file():
            return False
        ranks = facts.get("world_size") or 1
        try:
            return not changes(load_config(saved), self.config, ranks, ranks)
        except ConfigError:  # of an older dtrain: the training itself says what is wrong
            return False

    @property
    def score(self) -> float | None:
        """Of the best checkpoint: of trainer.monitor."""
        value = read_json(RunFolder(self.folder).checkpoints / "best" / "manifest.json").get("score")
        return None if value is None or not math.isfinite(float(value)) else float(value)


def sweep(path: str, overrides: Sequence[str], ranks: str | None = None, dry_run: bool = False) -> int:
    """Train every trial that is not finished yet, one after another.

    Returns:
        0 all are finished; 1 one has failed, which ends no other; 75 stopped early: start it again.

    Raises:
        ConfigError: Nothing is swept, or a trial's config is wrong: then none is started.
    """
    own = trials(path, overrides)
    command = ["launch", "--nproc-per-node", ranks] if ranks else ["train"]
    if dry_run:
        for trial in own:
            print(" ".join(["dtrain", command[0], path, *command[1:], *trial.overrides]))
        return DONE
    running = _Running()
    for number, trial in enumerate(own, 1):
        if running.is_stopped:
            break
        if trial.is_finished:
            trial.status = "finished before"
            continue
        print(f"sweep: trial {number} of {len(own)}: {trial.name}", flush=True)
        status = running.run([sys.executable, "-m", "dtrain", command[0], path, *command[1:], *trial.overrides])
        if status == STOPPED_EARLY or running.is_stopped:
            trial.status, running.is_stopped = "stopped early", True
        else:
            trial.status = "finished" if status == DONE else f"failed ({status})"
    print("\n".join(_table(own)), flush=True)
    if running.is_stopped:
        return STOPPED_EARLY
    return FAILED if any(trial.status.startswith("failed") for trial in own) else DONE


def trials(path: str, overrides: Sequence[str]) -> list[Trial]:
    """The trials of a sweep, each with its config checked: all combinations of the values that keys have.

    Raises:
        ConfigError: With the mistakes of all trials.
    """
    fixed = [text for text in overrides if len(values_of(text)) == 1]
    swept = {text.partition("=")[0]: values_of(text) for text in overrides if text not in fixed}
    if not swept:
        example = "optimizer.lr=1e-3,1e-2 or loaders.folds.fold=0..4"
        raise ConfigError(f"dtrain sweep: no key has several values; give one some, such as {example}")
    if (count := math.prod(map(len, swept.values()))) > MOST:
        raise ConfigError(f"dtrain sweep: {count} trials are more than {MOST}")
    base = load_config(path, fixed)
    folder, run_name = run_folder(base), base.get("run_name") or base.get("experiment")
    short = [key.rpartition(".")[2] for key in swept]
    labels = short if len(set(short)) == len(short) else list(swept)
    result: list[Trial] = []
    mistakes: dict[str, Mistake] = {}
    for values in product(*swept.values()):
        name = ",".join(f"{label}={_as_name(value)}" for label, value in zip(labels, values, strict=True))
        own = [f"{key}={value}" for key, value in zip(swept, values, strict=True)]
        own = [*fixed, *own, f"run_name={json.dumps(f'{run_name}-{name}')}"]
        own.append(f"trainer.checkpoint_dir={json.dumps(str(folder / name))}")
        try:
            config = load_config(path, own)
            check(config, "train")
            result.append(Trial(name, folder / name, own, config))
        except ConfigError as error:
            mistakes |= {str(item): item for item in error.mistakes}
    if mistakes:
        raise ConfigError(list(mistakes.values()))
    if twice := {trial.name for trial in result if [each.name for each in result].count(trial.name) > 1}:
        raise ConfigError(f"dtrain sweep: two trials would be called {sorted(twice)[0]}")
    return result


def values_of(override: str) -> list[str]:
    """The values of `KEY=VALUE` as texts: several where there are commas outside of brackets and quotes, or 0..4."""
    result: list[str] = []
    for part in _parts(override.partition("=")[2]):
        if found := re.fullmatch(r"\s*(-?\d+)\.\.(-?\d+)\s*", part):
            first, last = int(found[1]), int(found[2])
            step = 1 if last >= first else -1
            if abs(last - first) >= MOST:
                raise ConfigError(f"dtrain sweep: {part.strip()} has more than {MOST} values")
            result += map(str, range(first, last + step, step))
        else:
            result.append(part)
    return result


def _parts(text: str) -> list[str]:
    """A text cut at its commas, as far as these are not inside of brackets or quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote or letter in "\"'":
            quote = "" if letter == quote else quote or letter
        depth += (letter in "[{(") - (letter in ")}]") if not quote else 0
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _as_name(value: str) -> str:
    """A value as a part of a folder's name."""
    name = re.sub(r"[^\w.+=-]+", "-", value.strip()).strip("-") or "empty"
    return name.encode()[:MAX_NAME_BYTES].decode(errors="ignore")


class _Running:
    """The trial at work. A request to stop is passed on to it, and it alone decides when it has saved and ends."""

    def __init__(self) -> None:
        self.is_stopped = False
        self._process: subprocess.Popen[bytes] | None = None
        for number in stop_signals():
            signal.signal(number, self._pass_on)

    def run(self, command: list[str]) -> int:
        """The exit status of a command; killed by a signal, 128 and its number."""
        parent = os.getpid()
        # In a group of its own, so that a Ctrl-C reaches it once, from here.
        self._process = subprocess.Popen(command, process_group=0, preexec_fn=lambda: end_with(parent))
        if self.is_stopped:  # asked between two trials
            self._process.send_signal(signal.SIGTERM)
        status = self._process.wait()
        self._process = None
        return status if status >= 0 else 128 - status

    def _pass_on(self, number: int, _frame: Any) -> None:
        self.is_stopped = True
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)


def _table(own: Sequence[Trial]) -> Iterator[str]:
    """How each trial ended, and what they reached together."""
    rows = [("trial", "status", "score", "folder")]
    scores = []
    for trial in own:
        score = trial.score if trial.status.startswith("finished") else None
        scores += [] if score is None else [score]
        rows.append((trial.name, trial.status or "waiting", "" if score is None else f"{score:.4g}", str(trial.folder)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        yield "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
    if len(scores) > 1:
        spread = f"{statistics.mean(scores):.4g} +- {statistics.stdev(scores):.2g} (standard deviation)"
        yield f"score (trainer.monitor, of the best checkpoint) over {len(scores)} trials: {spread}"
