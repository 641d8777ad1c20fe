"""How far a training or a prediction is, and how long it will still take."""

from time import perf_counter

from dtrain.reporting.number_text import duration_text


class EpochClock:
    """Counts the optimizer steps of this process, or the patches of a prediction."""

    def __init__(self) -> None:
        self.epoch, self.steps = 0, 0  # from 1 on; steps in this epoch
        self.epochs: int | None = None  # None if something else ends the training
        self.done = 0  # of this epoch's steps; whoever does one counts it here
        self.of_patches = False  # else of optimizer steps
        self._before = 0  # steps of the epochs before; only differences of `counted` have a meaning
        self._measured_from: tuple[float, int] | None = None  # time, steps

    @property
    def counted(self) -> int:
        """Steps of this process so far."""
        return self._before + self.done

    def start_epoch(self, epoch: int, epochs: int | None, steps: int, done: int) -> None:
        """Count the steps of another epoch, of which some are done."""
        self._before += self.done - done
        self.epoch, self.epochs, self.steps, self.done = epoch, epochs, steps, done

    def measure_anew(self) -> None:
        """What took time until now says nothing about the time that is left."""
        self._measured_from = None

    def epoch_text(self) -> str:
        """3/20, of equal length in all epochs."""
        return str(self.epoch) if self.epochs is None else f"{self.epoch:>{len(str(self.epochs))}}/{self.epochs}"

    def epochs_done_text(self) -> str:
        """How many epochs are done: 3/20, within an epoch 2.5/20."""
        if self.done >= self.steps:
            return self.epoch_text()
        epochs = f"{self.epoch - 1 + self.done / self.steps:.1f}"
        return epochs if self.epochs is None else f"{epochs}/{self.epochs}"

    def left_text(self) -> str:
        """How long the training, or else this epoch, will still take; empty before that can be known."""
        if not self.counted:
            return ""
        now = perf_counter()
        if self._measured_from is None:
            self._measured_from = (now, self.counted)  # not from the start: the first step may compile or wait
        since, from_steps = self._measured_from
        if self.counted == from_steps:
            return ""
        left = self.steps - self.done
        if self.epochs is not None:
            left += (self.epochs - self.epoch) * self.steps
        text = duration_text(left * (now - since) / (self.counted - from_steps))
        return f"epoch ends in {text}" if self.epochs is None else f"{text} left"
