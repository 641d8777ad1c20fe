"""What `Trainer.fit` returns: how a training ended, its figures, and where its weights are."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from dtrain.checkpoint.checkpoint_files import step_in
from dtrain.checkpoint.checkpoint_folder import Checkpoints
from dtrain.tracking.run_folder import RunFolder, read_line
from dtrain.training.state import TrainState

Figures = dict[str, float]


@dataclass(frozen=True)
class Reached:
    """The facts of a `FitResult`."""

    run_folder: Path
    steps: int  # optimizer steps done, of all starts together
    epochs: int
    reason: str = ""  # why it ended before its limits
    best: Figures = field(default_factory=dict)  # of the validation that was best, as val/<name>
    last: Figures = field(default_factory=dict)  # of the last one
    test: Figures = field(default_factory=dict)  # as test/<name>
    best_checkpoint: Path | None = None  # without validations the last one; what test, predict and load_model take


class FitResult(str):
    """FINISHED, or KILLED where a request to stop ended it early; its attributes are those of `Reached`."""

    def __new__(cls, status: str, reached: Reached) -> "FitResult":
        """The status, as a string, with what was reached."""
        result = super().__new__(cls, status)
        vars(result).update(vars(reached))
        return result

    run_folder: Path
    steps: int
    epochs: int
    reason: str
    best: Figures
    last: Figures
    test: Figures
    best_checkpoint: Path | None

    @property
    def status(self) -> str:
        """The same as a plain string."""
        return str(self)

    def __repr__(self) -> str:
        ended = f" ({self.reason})" if self.reason else ""
        lines = [f"{self}{ended} after {self.steps:,} steps, {self.epochs} epoch(s)"]
        lines += [
            f"  {name:5} {_line(figures)}" for name in ("best", "last", "test") if (figures := getattr(self, name))
        ]
        lines += [f"  best checkpoint {self.best_checkpoint}"] if self.best_checkpoint else []
        return "\n".join([*lines, f"  run folder {self.run_folder}"])


def _line(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in figures.items())


def fit_result(
    status: str, reason: str, test_figures: Mapping[str, float], state: TrainState, folder: Path, saved: Checkpoints
) -> FitResult:
    """What a training has reached; the figures are those of its journal, which has those of earlier starts, too."""
    by_phase = _figures(folder)
    best = saved.chosen()
    step = None if best is None else step_in(best.name)
    val, test = by_phase["val"], by_phase["test"]
    reached = Reached(
        run_folder=folder,
        steps=state.step,
        epochs=state.epoch,
        reason=reason,
        best=val.get(step, {}),
        last=val.get(state.validated_step, {}),
        test=dict(test_figures) or (test.get(state.step, {}) if status == "FINISHED" else {}),
        best_checkpoint=best,
    )
    return FitResult(status, reached)


def _figures(folder: Path) -> dict[str, dict[int | None, Figures]]:
    """Phase -> step -> figures, of evaluations; where a training went back, those that it logged last."""
    found: dict[str, dict[int | None, Figures]] = {"val": {}, "test": {}}
    with suppress(OSError), RunFolder(folder).journal.open("rb") as lines:  # of a rank that does not see that disk
        for line in lines:
            entry = read_line(line) if line.startswith(b'{"kind": "metrics"') else {}
            for name, value in entry.get("values", {}).items():
                if (phase := name.partition("/")[0]) in found:
                    found[phase].setdefault(entry["step"], {})[name] = float(value)
    return found
