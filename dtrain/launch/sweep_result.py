"""What a sweep has found: a table of its trials, mean and spread of a grid, and the config of the best."""

import csv
import io
import shlex
import statistics
from collections.abc import Iterator, Sequence

from dtrain.config.load import merged
from dtrain.config.yaml12 import dump
from dtrain.distributed.exit_status import DONE, FAILED, STOPPED_EARLY
from dtrain.launch.grid import Grid
from dtrain.launch.study import Study
from dtrain.launch.trial import Plan, Trial
from dtrain.launch.trials_at_work import Source
from dtrain.tracking.whole_file import write_text


def conclude(plan: Plan, source: Grid | Study, is_stopped: bool) -> int:
    """Prints the table and writes it, and the best config; the exit status of the sweep."""
    own = source.trials()
    best = best_of(own, source.mode)
    print("\n".join(_table(own, source, best)))
    write_text(plan.own_folder / "trials.csv", _as_csv(plan, own, source.figure))
    if best:
        file = plan.own_folder / "best.yaml"
        write_text(file, f"# The best of {len(own)} trials: {best.name}\n{_best_config(plan, best)}")
        file.chmod(0o600)  # as the file it comes from, it may hold what others are not to see
        print(f"best: {best.name}, {source.figure} {best.score:.4g}; dtrain train {shlex.quote(str(file))}")
    print(f"trials in {plan.folder}, table in {plan.own_folder / 'trials.csv'}", flush=True)
    failed = sum(trial.status.startswith("failed") for trial in own)
    if failed:
        print(f"{failed} of {len(own)} trials failed", flush=True)
    return STOPPED_EARLY if is_stopped else FAILED if failed else DONE


def best_of(own: Sequence[Trial], mode: str | None) -> Trial | None:
    """Of the trials that have finished, the one with the best figure; None where nothing says what is best."""
    done = [(trial.score, trial) for trial in own if trial.status.startswith("finished") and trial.score is not None]
    if not done or mode is None:
        return None
    return (max if mode == "max" else min)(done, key=lambda item: item[0])[1]


def _best_config(plan: Plan, best: Trial) -> str:
    """A config that trains it once more, in a folder of its own."""
    values = merged(plan.path, plan.overrides_of(best.values))
    values.pop("sweep", None)
    values.setdefault("trainer", {})["checkpoint_dir"] = f"{plan.folder}-best".replace("${", "$${")
    if values["trainer"].get("mirror_to"):
        values["trainer"]["mirror_to"] += "/best"
    return dump(values)


def _table(own: Sequence[Trial], source: Source, best: Trial | None) -> Iterator[str]:
    """How each trial ended, and what they reached together."""
    rows = [(" ", "trial", "status", source.figure)]
    scores = []
    for trial in own:
        score = "" if trial.score is None else f"{trial.score:.4g}"
        rows.append(("*" if best and trial.name == best.name else "", trial.name, trial.status or "waiting", score))
        scores += [trial.score] if trial.status.startswith("finished") and trial.score is not None else []
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        yield "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
    if len(scores) > 1 and isinstance(source, Grid):
        spread = f"{statistics.mean(scores):.4g} +- {statistics.stdev(scores):.2g} (standard deviation)"
        yield f"{source.figure} of the best checkpoint over {len(scores)} trials: {spread}"


def _as_csv(plan: Plan, own: Sequence[Trial], figure: str) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["trial", "status", figure, *plan.swept, "folder"])
    for trial in own:
        values = [trial.values.get(key, "") for key in plan.swept]
        writer.writerow([trial.name, trial.status or "waiting", trial.score, *values, trial.folder])
    return file.getvalue()
