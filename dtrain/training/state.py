"""What a training is at one step: TrainState, Trainables, Activity; into a checkpoint's plain values and back."""

import copy
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from dtrain.checkpoint.checkpoint_files import LOSS, LOSS_EMA, Loaded
from dtrain.config.optimizers import ONE
from dtrain.data import rng
from dtrain.data.kept_attributes import KeptAttributes
from dtrain.data.samplers import ORDER
from dtrain.distributed.fsdp import is_shard
from dtrain.distributed.ranks import Ranks
from dtrain.loss import Criterion
from dtrain.training.ema import EMA
from dtrain.training.freezing import Freezing
from dtrain.training.memory_format import follow_weights
from dtrain.training.optimizer import Built, in_the_way_of, regrouped, start_momentum
from dtrain.training.parameter_groups import named_parameters
from dtrain.training.schedule import Schedule, Schedules
from dtrain.training.schedule_free import ScheduleFree
from dtrain.training.step_clock import Clock, StepClock

FORMAT = 1  # raised when a state of before can no longer be restored
PLAIN_FIELDS = (
    *("step", "epoch", "position", "best", "bad_validations", "validated_step", "score"),
    *("rate", "skipped", "overflows", "samples", "unsummed", "left_out", "skipped_batches", "order"),
    *("averaged_epoch", "swa_rates"),
)
SAMPLES_OF = ":samples"  # behind a figure's name: the sum of the samples that it is of
OF_BEFORE: dict[str, Any] = {
    "averaged_epoch": -1,
    "swa_rates": [],
    "overflows": 0,
    "unsummed": 0,
    "left_out": 0,
    "skipped_batches": 0,
    "order": 1,
}  # what older checkpoints do not hold


class DriftError(RuntimeError):
    """The ranks' weights are no longer the same."""


@dataclass(eq=False)
class TrainState:
    """The numbers that change while a training runs; all but `stopped` and `ended` are saved."""

    device: torch.device  # where running sums are kept
    step: int = 0  # optimizer steps done
    epoch: int = 0  # epochs done
    position: int = 0  # samples of this epoch done, by all ranks together
    best: float | None = None  # the best validation's score
    bad_validations: int = 0  # how many validations followed it
    validated_step: int = -1  # the step of the last validation; -1 before the first
    score: float | None = None  # of the last validation
    rate: float = 0.0  # the learning rate of the last step
    grad_norm: Tensor = field(init=False)  # of the last step's gradients, on the device
    skipped: int = 0  # steps that were not taken, since their loss or gradient was not finite
    overflows: int = 0  # the last so many of them, in a row, which were perhaps too large for fp16
    left_out: int = 0  # samples that a collate_fn left out
    step_left_out: int = 0  # of them those of the step at work
    skipped_batches: int = 0  # of which it left nothing
    order: int = ORDER  # the version of the order in which this epoch began
    averaged_epoch: int = -1  # the last whose weights are in `trainer.swa`'s average, counted from 0
    swa_rates: list[float] = field(default_factory=list)  # the groups' rates from which it began to set them
    samples: int = 0  # samples of all ranks since figures were last logged
    unsummed: int = 0  # those of them whose losses are not in the sums
    # This rank's since then, of the loss and each loss_<term>: tensors on the device; on the CPU numbers, to which
    # adding takes a tenth of the time.
    sums: dict[str, Any] = field(init=False)
    stopped: bool = False  # all ranks agreed to stop early
    ended: str = ""  # why the training ended before its limits

    def __post_init__(self) -> None:
        self.grad_norm = torch.zeros((), device=self.device)
        self.is_on_cpu = self.device.type == "cpu"
        self._dtype = torch.float32 if self.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        self.clear()

    @property
    def place(self) -> tuple[int, int, int]:
        """What tells two checkpoints of one training apart: step, epoch, step of the last validation."""
        return self.step, self.epoch, self.validated_step

    @property
    def newest_score(self) -> float | None:
        """The last validation's score, where it was of this very step."""
        return self.score if self.validated_step == self.step else None

    def add(self, name: str, value: Tensor | float, samples: int) -> None:
        """Add a mean over so many samples to the sum of that name."""
        sums = self.sums
        if self.is_on_cpu:
            sums[name] = sums.get(name, 0.0) + float(value) * samples
        elif name in sums:
            sums[name].add_(value, alpha=samples)
        else:
            sums[name] = self._as_sum(0.0).add_(value, alpha=samples)

    def add_figure(self, name: str, value: Tensor | float, samples: int) -> None:
        """The same of a figure that not every batch gives: its samples are added up, too."""
        self.add(name, value, samples)
        self.add(name + SAMPLES_OF, 1.0, samples)

    def clear(self) -> None:
        """Begin new sums: the old ones were logged."""
        self.sums = {"loss": self._as_sum(0.0)}
        self.samples = self.unsummed = 0

    @property
    def stacked_sums(self) -> Tensor:
        """The sums as one tensor on the device, in their order."""
        return torch.stack(
            [torch.as_tensor(value, dtype=self._dtype, device=self.device) for value in self.sums.values()]
        )

    def summed(self, ranks: Ranks, others: Sequence[float] = ()) -> list[float]:
        """The sums of all ranks in their order, and of other numbers behind them. All ranks call it."""
        if self.is_on_cpu and ranks.world_size == 1:  # four tensors fewer
            return [*self.sums.values(), *others]
        stacked = self.stacked_sums
        rest = torch.tensor(others, dtype=torch.float64).to(stacked)
        return ranks.sum_(torch.cat([stacked, rest])).tolist()

    def _as_sum(self, value: float) -> Any:
        return value if self.is_on_cpu else torch.full((), value, dtype=self._dtype, device=self.device)

    def state_dict(self) -> dict[str, Any]:
        """Plain values; the sums are this rank's."""
        sums = dict(zip(self.sums, self.stacked_sums.tolist(), strict=True))
        tensors = {"grad_norm": float(self.grad_norm), "sums": sums}
        return {name: getattr(self, name) for name in PLAIN_FIELDS} | tensors

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        for name in PLAIN_FIELDS:
            setattr(self, name, copy.copy(state[name] if name in state else OF_BEFORE[name]))
        if not self.position:
            self.order = ORDER
        self.grad_norm.fill_(state["grad_norm"])
        self.sums = {name: self._as_sum(value) for name, value in state["sums"].items()}


def means(sums: Mapping[str, float], samples: int) -> dict[str, float]:
    """The figures of a training whose sums over the ranks and over so many samples these are."""
    counts = {name: sums.get(name + SAMPLES_OF, samples) for name in sums if not name.endswith(SAMPLES_OF)}
    return {f"train/{name}": sums[name] / count for name, count in counts.items() if count}


@dataclass
class Trainables:
    """Everything with weights or a state of its own; `ema` to `scaler` and `loss_ema` are None where not trained."""

    module: Module  # the bare model: what is saved
    compiled: Module  # the same, compiled if so configured: what is evaluated
    model: Module  # the same, wrapped for the ranks: what is trained
    ema: EMA | ScheduleFree | None = None  # the averaged weights, if an average is kept; EMA, SWA, ...
    built: Mapping[str, Built] = field(default_factory=dict)  # the optimizers with their groups, by name
    schedule: Schedule | Schedules | None = None  # the learning rates'
    scaler: torch.amp.GradScaler | None = None  # of the loss, with fp16
    freezing: Freezing | None = None  # what is frozen in which epoch
    criterion: Criterion | None = None  # the loss
    loss: Module | None = None  # its own parameters and buffers; None where it has none
    loss_ema: EMA | ScheduleFree | None = None  # and their averages
    kept: Mapping[str, KeptAttributes] = field(default_factory=dict)  # what loss and metrics keep in plain attributes

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        """The optimizers by name; a single one is called `optimizer`."""
        return {name: built.optimizer for name, built in self.built.items()}

    @property
    def optimizer(self) -> Optimizer | None:
        """The only optimizer, or the first one."""
        return next(iter(self.optimizers.values()), None)

    @property
    def evaluated(self) -> Module:
        """The averaged weights where there are some, else the model."""
        return self.ema.module if self.ema and self.ema.is_ready else self.compiled

    @property
    def loss_objects(self) -> Mapping[str, Any]:
        """All that may keep something in plain attributes of a loss, by name."""
        return self.criterion.objects if self.criterion else {}

    @property
    def loss_now(self) -> Module | None:
        """What the loss holds by now of modules and parameters: a forward may have made some."""
        return self.criterion.modules_now() if self.criterion else None

    @property
    def all(self) -> Module:
        """The bare model, together with the loss where that has weights."""
        return self.module if self.loss is None else torch.nn.ModuleDict({"model": self.module, "loss": self.loss})

    @contextmanager
    def evaluating(self, module: Module) -> Iterator[None]:
        """The loss is in eval mode meanwhile; beside the averaged model it has its own averages, too."""
        pairs: list[tuple[Tensor, Tensor]] = []
        if self.ema and module is self.ema.module and self.loss is not None and self.loss_ema is not None:
            averages = self.loss_ema.module
            pairs += zip(self.loss.parameters(), averages.parameters(), strict=True)
            pairs += zip(self.loss.buffers(), averages.buffers(), strict=True)
        _swap(pairs)
        if self.criterion:
            self.criterion.train(False)
        try:
            yield
        finally:
            _swap(pairs)
            if self.criterion:
                self.criterion.train()


def _swap(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for one, other in pairs:
        one.data, other.data = other.data, one.data


class Activity:
    """What this rank does now, written by the loop, and for how long; watchdog and failure card read it.

    Args:
        phase: "start-up", "waiting for data", "forward", "validation" ...; default: the clock's.
        clock: What counts the seconds of each.
    """

    enter: Callable[[str], None]  # begins another phase: the clock's own, since it is called several times a step

    def __init__(self, phase: str = "", clock: Clock | None = None) -> None:
        self.beats = 0  # grows as long as there is progress
        self.batch_start = 0  # the position of the batch at work or waited for
        self.data_set = ""  # the name of the one that is, or was last, evaluated
        self.follow(clock or StepClock())
        if phase:
            self.enter(phase)

    def follow(self, clock: Clock) -> None:
        """From now on this clock counts."""
        self.clock, self.enter = clock, clock.enter

    @property
    def phase(self) -> str:
        """What this rank does now."""
        return self.clock.phase

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Name a phase; an error leaves its name, by which the error is told."""
        before = self.phase
        self.enter(phase)
        yield
        self.enter(before)


def capture(
    state: TrainState, trainables: Trainables, ranks: Ranks, seed: int, generators: dict[int, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None, dict[str, dict[str, Any]]]:
    """What a checkpoint holds: state, weights, averaged weights, the loss's. All ranks call it.

    It is as one process has it, and complete on the main rank alone; or, where every rank saves its shards, with each
    rank's shards on it. The state of the ranks' generators is given where they cannot be asked; then no other rank is
    needed: this rank's sums are taken for the sums of all, and what it has of a sharded model for the model.

    Raises:
        DriftError: The ranks' weights are no longer the same.
    """
    assert trainables.schedule is not None
    values = state.state_dict()
    if generators is None:
        values["sums"] = dict(zip(state.sums, state.summed(ranks), strict=True))
        generator_states = _generators_of_all(trainables.all, ranks)
    else:
        generator_states = list(generators.values())
    ema, optimizers = trainables.ema, trainables.optimizers
    to_save = ranks.strategy.to_save if generators is None else ranks.strategy.here
    values |= {
        "format": FORMAT,
        "optimizer": _one_or_all({name: to_save(each.state_dict()) for name, each in optimizers.items()}),
        "optimizer_name": _one_or_all({name: type(each).__name__ for name, each in optimizers.items()}),
        "parameters": _one_or_all({name: built.names for name, built in trainables.built.items()}),
        "schedule": trainables.schedule.state_dict(),
        "scaler": trainables.scaler.state_dict() if trainables.scaler else {},
        "averaged": ema.updates if ema else 0,
        "kept": {name: kept.state_dict() for name, kept in trainables.kept.items()},
        "seed": seed,
        "rng": generator_states,
    }
    averaged = to_save(ema.module.state_dict()) if ema and ema.is_ready else None
    of_loss = {name: to_save(part.state_dict()) for name, part in _parts_of_loss(trainables).items()}
    return values, to_save(trainables.module.state_dict()), averaged, of_loss


def capture_own(
    state: TrainState, trainables: Trainables, is_main: bool
) -> tuple[dict[str, Any], dict[str, Any], None, dict[str, dict[str, Any]]]:
    """What a rank alone knows of a model that all of them have, in the form of `capture`; no other rank is needed.

    It is its random numbers and sums; of the main rank also buffers and plain attributes, which differ between ranks.
    """
    values: dict[str, Any] = {"sums": state.state_dict()["sums"], "rng": [rng.get_state()]}
    if is_main:
        values["kept"] = {name: kept.state_dict() for name, kept in trainables.kept.items()}
        modules = {"weights": trainables.module, **_parts_of_loss(trainables)}
        if (ema := trainables.ema) and ema.is_ready:
            modules["ema"] = ema.module
        values["buffers"] = {key: _saved_buffers(module) for key, module in modules.items()}
    return values, {}, None, {}


def _saved_buffers(module: Module) -> dict[str, Tensor]:
    """Those that are part of its state_dict."""
    names = {name for name, _ in module.named_buffers()}
    return {name: value for name, value in module.state_dict().items() if name in names}


def _one_or_all(values: dict[str, Any]) -> Any:
    """What a checkpoint holds of the optimizers: of a single one the value itself, of several all by name."""
    return values if [*values] != [ONE] else values[ONE]


def _parts_of_loss(trainables: Trainables) -> dict[str, Module]:
    """What a checkpoint holds of the loss, by the name of its file."""
    own, ema = trainables.loss, trainables.loss_ema
    return ({LOSS: own} if own is not None else {}) | ({LOSS_EMA: ema.module} if ema is not None else {})


def _restore_optimizers(trainables: Trainables, ranks: Ranks, states: Any, names: Any) -> None:
    """Load the optimizers' states, which the main rank has (None elsewhere); older checkpoints have no names."""
    if [*trainables.built] == [ONE]:
        states, names = {ONE: states}, {ONE: names}
    for name, built in trainables.built.items():
        state = (states or {}).get(name)
        if state is not None:
            fallback = [item.name for item in named_parameters(trainables.module, trainables.loss)]
            state = regrouped(built, state, (names or {}).get(name) or fallback)
        ranks.strategy.load_optimizer(built.optimizer, in_the_way_of(built.optimizer, state))
        start_momentum(built.optimizer)
        follow_weights(built.optimizer)


def _generators_of_all(module: Module, ranks: Ranks) -> list[Any] | None:
    """The ranks' generators, on the main rank; a wrong collective, or a bad GPU, shows: their weights are compared."""
    if ranks.world_size == 1:
        return [rng.get_state()]
    own = fingerprint(module)
    gathered = ranks.gather((rng.get_state(), array("q", own.values())))  # without names, which are the same
    if gathered is None:
        return None
    states, fingerprints = zip(*gathered, strict=True)
    for number, (name, value) in enumerate(own.items()):
        if differing := [str(rank) for rank, its in enumerate(fingerprints) if [*its[number : number + 1]] != [value]]:
            named = ", ".join(differing)
            raise DriftError(f"the ranks' weights are not the same: {name} of rank {named} is not that of rank 0")
    return list(states)


def fingerprint(module: Module) -> dict[str, int]:
    """A checksum of each tensor's bits, by name, but for shards; it costs one reading of them, and one wait."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    entries = {name: item for name, item in module.state_dict().items() if isinstance(item, Tensor)}
    tensors = {name: item.detach() for name, item in entries.items() if not is_shard(item)}
    sums = []
    for value in tensors.values():
        real = torch.view_as_real(value) if value.is_complex() else value
        sums.append(real.contiguous().view(-1).view(bits[real.element_size()]).sum(dtype=torch.int64))
    values = torch.stack([item.to(sums[0].device) for item in sums]).tolist() if sums else []
    return dict(zip(tensors, values, strict=True))


def restore(loaded: Loaded | None, state: TrainState, trainables: Trainables, ranks: Ranks, seed: int) -> None:
    """Resume from a checkpoint, which only the main rank has looked into (None elsewhere). All ranks call it."""
    assert trainables.schedule is not None
    ranks.strategy.load_weights(trainables.module, loaded.weights if loaded else None)
    if trainables.ema:
        own = loaded.ema or loaded.weights if loaded else None  # an average that begins now begins with the weights
        ranks.strategy.load_weights(trainables.ema.module, own)
    for name, part in _parts_of_loss(trainables).items():
        others = loaded.others if loaded else {}
        ranks.strategy.load_weights(part, others.get(name, others.get(LOSS)))
    values = dict(loaded.state) if loaded else {}
    _restore_optimizers(trainables, ranks, values.pop("optimizer", None), values.pop("parameters", None))
    values = ranks.broadcast(values)
    if not ranks.is_main:  # all ranks add up the same sums; what was summed so far is rank 0's
        values["sums"] = dict.fromkeys(values["sums"], 0.0)
    state.load_state_dict(values)
    trainables.schedule.load_state_dict(values["schedule"])
    if trainables.scaler and values["scaler"]:
        trainables.scaler.load_state_dict(values["scaler"])
    if trainables.ema:
        trainables.ema.resume(values["averaged"], state.averaged_epoch)
    if trainables.loss_ema:
        trainables.loss_ema.resume(values["averaged"], state.averaged_epoch)
    for name, kept in trainables.kept.items():
        kept.load_state_dict(values.get("kept", {}).get(name, {}))
    if len(values["rng"]) == ranks.world_size:
        rng.set_state(values["rng"][ranks.rank])
    else:  # another number of ranks: new streams, that no earlier start has used
        rng.seed_all(seed, 2 + ranks.rank, state.step)
