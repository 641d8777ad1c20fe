"""Peak memory of a training step, forecast on fake tensors (shapes without storage): for any batch, without a GPU."""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from ml_collections import ConfigDict
from torch import Tensor
from torch.nn import Module, functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from dtrain.config.errors import one_line
from dtrain.data.batch import to_device
from dtrain.dataloader import first_batch
from dtrain.distributed.fsdp import MIN_PARAMETERS, units
from dtrain.loss import get_loss_criterion
from dtrain.modelloader import get_model
from dtrain.trainer import Trainer
from dtrain.training.activation_checkpointing import checkpoint_activations
from dtrain.training.optimizer import freeze
from dtrain.training.parameter_groups import named_parameters
from dtrain.training.setup import make_lazy_parts

_aten: Any = torch.ops.aten
MOST_SAMPLES = 1 << 24  # of a batch, with which the search for the largest ends


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of storages that live at the same time: those that operators make, and those it is told of.

    What an operator takes for itself and gives back before it returns is not seen. Of these, convolutions' backward
    takes most, on CPUs and GPUs: work space, which is counted as one more copy of the input. torch's own `MemTracker`
    counts in the same way; it needs hooks on all modules, which a model's own `forward` may go around.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._living: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operator."""
        result = self._called(func, args, kwargs or {})
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor):
                self.note(leaf)
        if func is _aten.convolution_backward.default:
            self.peak = max(self.peak, self.now + _bytes(args[1]))
        return result

    def _called(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)

    def note(self, tensor: Tensor) -> None:
        """Count what lies under a tensor, once, until it is freed."""
        try:
            storage = tensor.untyped_storage()
        except NotImplementedError:  # of a sparse tensor
            return
        number, size = id(storage), storage.nbytes()
        if number in self._living:
            return

        def freed(_: Any) -> None:
            del self._living[number]
            self.now -= size

        self._living[number] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


@contextlib.contextmanager
def _as_on_gpu() -> Iterator[None]:
    """What CPUs keep otherwise than GPUs: there dropout's mask has one byte per number, and attention keeps none.

    The functions are replaced: a `TorchFunctionMode` would not see what backward computes again.
    """
    attention = functional.scaled_dot_product_attention

    def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(input, p, True)[0] if training and p else input

    def without_dropout(query: Any, key: Any, value: Any, mask: Any = None, dropout_p: float = 0.0, *rest: Any,
                        attn_mask: Any = None, **options: Any) -> Tensor:  # fmt: skip
        return attention(query, key, value, mask if attn_mask is None else attn_mask, 0.0, *rest, **options)

    with (
        patch.object(functional, "dropout", dropout),
        patch.object(functional, "scaled_dot_product_attention", without_dropout),
    ):
        yield


class _LiveFakes(LiveStorages):
    """The same of fake tensors: what a model or loss asks of values is answered as for valid, full data.

    A test for something wrong finds nothing, one that all is right succeeds; of a mask everything is chosen, so that
    what depends on it is as large as it can be.
    """

    def __init__(self) -> None:
        super().__init__()
        self._true: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensors that say of all of something that it holds

    def _called(self, func: Any, args: Any, kwargs: Any) -> Any:
        packet = func.overloadpacket
        if packet is _aten._local_scalar_dense:
            return _scalar(args[0].dtype, args[0] in self._true)
        if packet is _aten.equal:
            return True
        if packet is _aten.nonzero:
            return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        if packet is _aten.masked_select:
            return args[0].new_empty((max(args[0].numel(), args[1].numel()),))
        if packet is _aten.index and any(item is not None and item.dtype == torch.bool for item in args[1]):
            args = (args[0], _as_numbers(args[1]))
        result = func(*args, **kwargs)
        is_true = packet in (_aten.all, _aten.isfinite) or (
            packet in (_aten.bitwise_and, _aten.logical_and) and all(item in self._true for item in args)
        )
        if is_true and isinstance(result, Tensor):
            self._true[result] = True
        return result


def _scalar(dtype: torch.dtype, is_true: bool) -> Any:
    """A value of a tensor that has none."""
    if dtype == torch.bool:
        return is_true
    return 0.0 if dtype.is_floating_point else 0


def _as_numbers(indices: Any) -> list[Any]:
    """Masks among indices as the numbers of all that they could choose."""
    numbers: list[Any] = []
    for item in indices:
        if item is None or item.dtype != torch.bool:
            numbers.append(item)
        else:
            numbers += [item.new_zeros((item.numel(),), dtype=torch.int64) for _ in range(item.dim())]
    return numbers


class Step(NamedTuple):
    """What one forward and backward pass of a process takes."""

    samples: int
    peak: int  # bytes that live at the same time, weights and gradients included, optimizer and averages not
    unused: tuple[str, ...] | None  # parameters that got no gradient; None: not known


class Held(NamedTuple):
    """Bytes that a process of a training holds all the time; its gradients are there from backward to step."""

    weights: int  # and buffers
    gradients: int
    optimizer: int
    averages: int  # of weights: EMA, SWA
    largest: int  # parameter, whose step takes temporary tensors
    gathered: int  # of a sharded model at a time
    unit: int  # the largest part of it whose gradients are summed over the ranks at a time
    may_keep_gradients: bool = False  # so that they do not live in DDP's buckets


class NoForecastError(Exception):
    """Why fake tensors cannot go through a model."""


class FakeSteps:
    """The training step of a config on fake tensors, of a model that is built for it.

    Raises:
        NoForecastError: A loop of the user's own decides what a step is.
    """

    def __init__(self, trainer: Trainer, config: ConfigDict, options: dict[str, Any], as_on_gpu: bool = True) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        changed = [name for name in ("training_step", "backward", "learn", "take_step")
                   if getattr(type(trainer), name) is not getattr(Trainer, name)]  # fmt: skip
        if changed:
            raise NoForecastError(f"{type(trainer).__name__} has a {changed[0]} of its own")
        self._accumulate, self._as_on_gpu = options["accumulate"], as_on_gpu
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        # A torch without CUDA cannot take a gradient of a fake tensor on a GPU: there the CPU's shapes have to do.
        self._device = torch.device("cuda" if torch.backends.cuda.is_built() else "cpu")
        self._build(trainer, config, options)
        self.batch = first_batch(trainer.loaders)
        self.samples = trainer.train_loader.shard.own_samples(0, trainer.train_loader.shard.edge(0, 1))

    def _build(self, trainer: Trainer, config: ConfigDict, options: dict[str, Any]) -> None:
        module, criterion = get_model(config), get_loss_criterion(config)
        cpu = torch.device("cpu")
        whole = replace(trainer.forward, module=module, criterion=criterion, device=cpu, precision="fp32", say=bool)
        make_lazy_parts(whole, trainer.loaders)
        checkpoint_activations(module, options["activation_checkpointing"])
        later = freeze(config, module, criterion.module).thawed_later  # the peak comes once they are trained
        for item in named_parameters(module, criterion.module):
            if item.name in later:
                item.parameter.requires_grad_(True)
        self.units = units(module, (options["fsdp"] or {}).get("layers"), _least(options))
        held: dict[int, Tensor] = {}
        with self._mode:
            for part in (module, criterion.module):
                if part is not None:
                    self._replace(part, held)
        self._module, self._criterion, self._held = module.train(), criterion, held
        self._forward = replace(trainer.forward, module=module, criterion=criterion, device=self._device, say=bool)
        self._forward.to_device = to_device  # without the trainer's clock
        self._forward._check_target = None  # it would look at values

    def _replace(self, module: Module, held: dict[int, Tensor]) -> None:
        """Put fake tensors in the places of all parameters and buffers; those that are one stay one."""

        def fake(tensor: Tensor) -> Tensor:
            if id(tensor) not in held:
                layout: Any = dict(dtype=tensor.dtype, device=self._device)
                made = torch.empty_strided(tensor.size(), tensor.stride(), **layout)
                if isinstance(tensor, torch.nn.Parameter):
                    made = torch.nn.Parameter(made, tensor.requires_grad)
                held[id(tensor)] = made
                self._real.append(tensor)  # so that no other gets its number
            return held[id(tensor)]

        self._real: list[Tensor] = getattr(self, "_real", [])
        for part in module.modules():
            for name, parameter in [*part._parameters.items()]:
                if parameter is not None:
                    setattr(part, name, fake(parameter))  # an RNN has more places for them, which it fills itself
            for name, buffer in [*part._buffers.items()]:
                if buffer is not None:
                    part._buffers[name] = fake(buffer)

    def can_resize(self) -> bool:
        """Whether a batch of another number of samples can be made of the first one."""
        return resized(self.batch, self.samples, self.samples) is not None

    def step(self, samples: int, as_on_gpu: bool | None = None) -> Step:
        """One step of so many samples, on a GPU or a CPU. Default: as it was made for.

        Raises:
            NoForecastError: The model does with values what cannot be done without.
        """
        with self._on_fakes(as_on_gpu), _LiveFakes() as live:
            for tensor in self._held.values():
                live.note(tensor)
            batch = self._batch_of(samples)
            for leaf in tree_iter(batch):
                if isinstance(leaf, Tensor):
                    live.note(leaf)
            for _ in range(min(2, self._accumulate)):  # the second has the first one's gradients beside it
                self._forward(self._module, batch)[0].backward()
            named = named_parameters(self._module, self._criterion.module)
            unused = [item.name for item in named if item.parameter.requires_grad and item.parameter.grad is None]
        return Step(samples, live.peak, tuple(unused))

    def flops(self) -> tuple[int, int]:
        """Of one batch: those of the forward pass, and those of both; a multiplication with an addition is two.

        Raises:
            NoForecastError: As for `step`.
        """
        from torch.utils.flop_counter import FlopCounterMode  # beside `_LiveFakes` it would keep checkpoints' tensors

        with self._on_fakes(), FlopCounterMode(display=False) as flops, _LiveFakes():
            loss = self._forward(self._module, self._batch_of(self.samples))[0]
            forward = flops.get_total_flops()
            loss.backward()
        return forward, flops.get_total_flops()

    @contextlib.contextmanager
    def _on_fakes(self, as_on_gpu: bool | None = None) -> Iterator[None]:
        is_gpu = self._as_on_gpu if as_on_gpu is None else as_on_gpu
        try:
            with _as_on_gpu() if is_gpu else contextlib.nullcontext(), self._mode:
                yield
        except Exception as error:
            raise NoForecastError(
                f"without values its step raised {type(error).__name__}: {one_line(str(error))}"
            ) from error
        finally:
            for tensor in self._held.values():
                tensor.grad = None

    def _batch_of(self, samples: int) -> Any:
        batch = self.batch if samples == self.samples else resized(self.batch, self.samples, samples)
        return tree_map_only(Tensor, lambda leaf: torch.empty_like(leaf, device=self._device), batch)

    @property
    def knows_cpu(self) -> bool:
        """Whether a step on a CPU can be forecast, too: not where the fake tensors are a GPU's."""
        return self._device.type == "cpu"

    def has_rnn(self) -> bool:
        """Whether the model has layers whose work space fake tensors do not show."""
        return any(isinstance(part, torch.nn.RNNBase) for part in self._module.modules())

    def held(self, of_trainer: Held) -> Held:
        """What a process holds, with the weights of this step's model, and what of them is gathered at a time."""
        tensors = [*self._held.values()]
        trained = [_bytes(item) for item in tensors if item.requires_grad]
        inner = [sum(map(_bytes, unit.parameters())) for unit in self.units]
        outer = sum(map(_bytes, self._module.parameters())) - sum(inner)
        weights = sum(map(_bytes, tensors))
        return Held(
            weights, sum(trained), of_trainer.optimizer, weights if of_trainer.averages else 0,
            max(trained, default=0), max(0, outer) + 2 * max(inner, default=0), max([outer, *inner]),
            of_trainer.may_keep_gradients,
        )  # fmt: skip


def held_by(trainer: Trainer) -> Held:
    """What a trainer with a whole model holds; of the optimizer what it has after a step."""
    parameters = [*trainer.module.parameters()]
    trained = [_bytes(item) for item in parameters if item.requires_grad]
    states = [each.state for each in trainer.optimizers.values()]
    state = sum(_bytes(leaf) for each in states for values in each.values() for leaf in tree_iter(values))
    weights = sum(map(_bytes, (*parameters, *trainer.module.buffers())))
    averages = weights if trainer.trainables.ema is not None else 0
    largest = max(trained, default=0)
    return Held(weights, sum(trained), state, averages, largest, weights, weights, trainer.may_keep_gradients)


def _least(options: dict[str, Any]) -> int:
    least = (options["fsdp"] or {}).get("min_parameters")
    return MIN_PARAMETERS if least is None else least


def _bytes(tensor: Any) -> int:
    return tensor.numel() * tensor.element_size() if isinstance(tensor, Tensor) else 0


def resized(batch: Any, count: int, wanted: int) -> Any:
    """A batch of another number of samples, whose values mean nothing; None where it is not seen what samples are."""
    leaves = [leaf for leaf in tree_iter(batch) if isinstance(leaf, Tensor) and leaf.dim()]
    if not leaves or any(leaf.size(0) != count for leaf in leaves):
        return None
    return tree_map_only(Tensor, lambda leaf: leaf.new_empty((wanted, *leaf.shape[1:])) if leaf.dim() else leaf, batch)


class Peak(NamedTuple):
    """Bytes of one rank at the peak of a training, and what they are of."""

    total: int
    weights: int
    gradients: int
    optimizer: int
    averages: int
    exchange: int  # DDP's buckets, or what a sharded model gathers
    activations: int  # and the batch: what is left of the total


def peak_of(step: Step, held: Held, world_size: int, options: dict[str, Any]) -> Peak:
    """The peak of a rank among others.

    With ddp each rank has everything, and buckets of the gradients' size, in which these may live. With fsdp it has a
    part of weights, gradients, optimizer and averages, and beside them whole weights: of two units at a time and of
    what is in none.
    """
    is_sharded = options["strategy"] == "fsdp"
    fsdp = options["fsdp"] or {}
    copies = fsdp.get("replicate") or 1
    shards = max(1, world_size // copies) if is_sharded and isinstance(copies, int) else 1
    weights, gradients, optimizer, averages = (
        -(-size // shards) for size in (held.weights, held.gradients, held.optimizer, held.averages)
    )
    activations = step.peak - held.weights
    exchange = in_buckets = 0
    if is_sharded:
        exchange = held.weights if fsdp.get("reshard_after_forward") is False else held.gathered
        if fsdp.get("param_dtype") == "bf16":
            exchange //= 2
    elif world_size > 1:
        # Those of a step's first batches are added up beside the buckets.
        in_buckets_asked = (options["ddp"] or {}).get("gradient_as_bucket_view")
        is_apart = held.may_keep_gradients if in_buckets_asked is None else not in_buckets_asked
        is_apart = is_apart or options["accumulate"] > 1
        exchange, in_buckets = (gradients, 0) if is_apart else (0, gradients)
    if fsdp.get("cpu_offload") and is_sharded:
        weights = gradients = optimizer = 0
    always = weights + optimizer + averages + exchange + in_buckets
    in_step = gradients - in_buckets + (2 * held.largest) // shards
    if is_sharded:  # a unit's gradients, whole, and their copy in the order in which the ranks get them
        in_step = max(in_step, 2 * held.unit + gradients - held.unit // shards)
    total = always + max(activations, in_step)
    rest = total - always - (gradients - in_buckets)
    return Peak(total, weights, gradients, optimizer, averages, exchange, max(0, rest))


def largest_batch(fits: Callable[[int], int], start: int, limit: int) -> int:
    """The most samples with which a peak stays within a limit, to a hundredth; 0 where not even one fits.

    Args:
        fits: The peak in bytes for so many samples. It grows in a nearly straight line, which saves calls: a few do.
        start: A number of samples to begin with.
        limit: In bytes.
    """
    low, high = 0, MOST_SAMPLES + 1  # the most known to fit, the fewest known not to
    one, other = start, 2 * start
    peaks = {number: fits(number) for number in (one, other)}
    for _ in range(8):
        for number, peak in peaks.items():
            low, high = (max(low, number), high) if peak <= limit else (low, min(high, number))
        if high - low <= max(1, low // 100):
            break
        slope = (peaks[other] - peaks[one]) / (other - one)
        guess = one + int((limit - peaks[one]) / slope) if slope > 0 else high - 1
        one, other = other, min(max(guess, low + 1), high - 1)
        if other == one:
            break
        peaks[other] = fits(other)
    return max([low, *(number for number, peak in peaks.items() if peak <= limit)])


def real_step(trainer: Trainer, samples: int | None = None) -> Step:
    """The same as measured: forward and backward of the first step's batches, as this trainer's own loop does them.

    On one process alone, whose gradients are then thrown away.

    Args:
        trainer: Whose state of this step is cleared.
        samples: Of each batch so many of the first ones, where `narrowed` can take them; None: all.
    """
    trainer.state.clear()
    count = 0
    with LiveStorages() as live:
        for tensor in (*trainer.module.parameters(), *trainer.module.buffers()):
            live.note(tensor)
        for micro in first_step(trainer):
            if samples is not None:
                micro = micro._replace(batch=narrowed(micro.batch, micro.samples, samples), samples=samples)
            trainer.learn(micro)
            count = count or micro.samples
    named = named_parameters(trainer.module, trainer.trainables.loss)
    unused = tuple(item.name for item in named if item.parameter.requires_grad and item.parameter.grad is None)
    is_known = not trainer.own.is_taken  # else its steps have taken the gradients away
    _throw_away_gradients(trainer)
    return Step(count, live.peak, unused if is_known else None)


def real_flops(trainer: Trainer) -> int:
    """Of one step, forward and backward, as this trainer's own loop does it, on one process alone."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as flops:
        for micro in first_step(trainer):
            trainer.learn(micro)
    _throw_away_gradients(trainer)
    return flops.get_total_flops()


def _throw_away_gradients(trainer: Trainer) -> None:
    trainer.own.end()
    for optimizer in trainer.optimizers.values():
        optimizer.zero_grad()


def first_step(trainer: Trainer) -> Iterator[Any]:
    """This rank's batches of the first step of an epoch."""
    for micro in trainer.train_loader.epoch(0):
        if micro.batch is not None:
            yield micro
        if micro.closes:
            return


def narrowed(batch: Any, count: int, wanted: int) -> Any:
    """The first samples of a batch; all of them where it is not seen what samples are."""
    if resized(batch, count, 1) is None:
        return batch
    return tree_map_only(Tensor, lambda leaf: leaf[:wanted] if leaf.dim() else leaf, batch)
