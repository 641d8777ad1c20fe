"""A sweep over all combinations of some values."""

from collections.abc import Sequence

from dtrain.launch.trial import Trial


class Grid:
    """All combinations of values, one after another; those that are finished already are left out."""

    def __init__(self, own: Sequence[Trial], figure: str, mode: str | None) -> None:
        self.own, self.figure, self.mode = own, figure, mode
        for trial in own:
            if trial.is_finished:
                trial.status, trial.score = "finished before", trial.best_score
        self._left = [trial for trial in own if not trial.status]

    def next(self) -> Trial | None:
        """The next one."""
        return self._left.pop(0) if self._left else None

    def is_behind(self, trial: Trial) -> str:
        """Never: a pruner makes a study of it."""
        return ""

    def ended(self, trial: Trial) -> None:
        """Nothing is to be done."""

    def trials(self) -> list[Trial]:
        """All of them."""
        return [*self.own]

    @property
    def total(self) -> int:
        """How many trials there are."""
        return len(self.own)

    @property
    def done(self) -> int:
        """How many of them have ended, other than stopped early."""
        return sum(trial.status not in ("", "running", "stopped early") for trial in self.own)

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to be trained."""
        return not self._left
