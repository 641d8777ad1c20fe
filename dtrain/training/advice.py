"""What to change where much of an epoch's time is lost: one sentence."""

from collections.abc import Mapping
from dataclasses import dataclass

from dtrain.training.step_clock import PHASES

MOST_LOST = 0.2  # of an epoch, outside of what a training is for
LEAST_SECONDS = 0.5  # lost in it, to speak of them
_WORK = ("forward", "backward", "optimizer")


@dataclass
class Advisor:
    """What the settings are that can be changed; each kind of loss is told once."""

    cores: int  # of this machine, for each of its ranks
    num_workers: int
    pin_memory: bool
    log_every_steps: float
    checkpoint_every_steps: float
    checkpoint_every_minutes: float | None
    validate_every_steps: float

    def __post_init__(self) -> None:
        self._told: set[str] = set()

    def advice(self, epoch: int, spent: Mapping[str, float]) -> str:
        """Of an epoch (from 1 on) and its seconds of each kind: what was lost most, and the cure; '' for nothing."""
        lost = {kind: seconds for kind, seconds in spent.items() if kind not in _WORK}
        most, whole = max(lost, key=lost.__getitem__), sum(spent.values())
        if sum(lost.values()) <= max(MOST_LOST * whole, LEAST_SECONDS) or most in self._told:
            return ""
        self._told.add(most)
        of_it = f"{lost[most] / whole:.0%} {_DOING.get(most, PHASES[most])}"
        share = f"{sum(lost.values()) / whole:.0%} of epoch {epoch} passed outside forward, backward and optimizer"
        return f"{share}, {of_it}: {getattr(self, f'_against_{most}')()}"

    def _against_data_wait(self) -> str:
        if self.num_workers < self.cores:
            return f"try more loaders.num_workers (now {self.num_workers}, of {self.cores} cores)"
        return f"with {self.num_workers} workers on {self.cores} cores, samples that are cheaper to load would help"

    def _against_transfer(self) -> str:
        if not self.pin_memory:
            return "try loaders.pin_memory: true"
        return "smaller samples would help, such as uint8 that the model converts on its device"

    def _against_logging(self) -> str:
        return f"try a larger trainer.log_every_steps (now {self.log_every_steps})"

    def _against_checkpoint(self) -> str:
        if self.checkpoint_every_steps < float("inf"):
            return f"try a larger trainer.checkpoint_every_steps (now {self.checkpoint_every_steps})"
        if self.checkpoint_every_minutes is not None:
            return f"try a larger trainer.checkpoint_every_minutes (now {self.checkpoint_every_minutes:g})"
        if self.validate_every_steps < float("inf"):
            now = f"(now {self.validate_every_steps})"
            return f"one follows each validation; try a larger trainer.validate_every_steps {now}"
        return "one follows each epoch; trainer.steps_per_epoch makes epochs longer"


_DOING = {"transfer": "moving batches to the device", "checkpoint": "saving checkpoints"}
