"""The strategy fsdp: a model sharded over the ranks (torch's FSDP2), each of which holds a part of every weight.

A checkpoint gets each rank's part (`chunk_of`), or whole weights in the form that one process has: gathered on the main
rank, tensor by tensor, and divided from there. accelerate's FSDP settings are honoured; the sharding itself is torch's
own `fully_shard`, since accelerate 1.15 does none without a GPU, and its rule by size fails at a ModuleList.
"""

import contextlib
import copy
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only

from dtrain.config.errors import ConfigError
from dtrain.distributed.collectives import Collectives, Forward

_SHARD = "dtrain.shard"  # the key of a rank's part of a tensor, in `FSDP.here`
MIN_PARAMETERS = 1_000_000  # smaller parts are not worth a message of their own


def fsdp_options(  # noqa: PLR0913
    *,
    layers: list[str] | None = None,
    min_parameters: int | None = None,
    reshard_after_forward: bool | None = None,
    param_dtype: Literal["fp32", "bf16"] | None = None,
    reduce_dtype: Literal["fp32", "bf16"] | None = None,
    cpu_offload: bool | None = None,
    replicate: int | Literal["nodes"] | None = None,
    state_dict_type: Literal["sharded", "full"] | None = None,
) -> dict[str, Any]:
    """The keys under `trainer.fsdp`: what is gathered at a time, in which types, and where it lies meanwhile.

    Args:
        layers: Class names of the parts that are gathered one by one. Default: by size.
        min_parameters: Without `layers`, the elements of a ModuleList or Sequential with at least so many.
        reshard_after_forward: Free a part's weights until the backward pass (default true); false takes memory and
            saves messages.
        param_dtype: In which type weights are gathered for forward and backward (default fp32); bf16 takes half the
            messages and memory, with `trainer.precision: bf16` alone. Each rank's own part and its optimizer stay fp32.
        reduce_dtype: In which type gradients are summed over the ranks (default fp32).
        cpu_offload: Keep each rank's part, its gradients and its optimizer in host memory.
        replicate: So many copies of the sharded model (HSDP): each is divided over world size / replicate ranks, and
            gradients are averaged over the copies. nodes: one copy for each node.
        state_dict_type: How checkpoints are written: sharded, by every rank its part; full, gathered by rank 0, whose
            memory must hold all. Default: sharded where all ranks see the run folder, else full.
    """
    return dict(locals())


def launcher_strategy() -> str | None:
    """The strategy that `accelerate launch` was asked for: fsdp; None when it was not."""
    return "fsdp" if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes") else None


def settings_of_accelerate() -> dict[str, Any]:
    """What accelerate's FSDP settings say, as `fsdp_options`, and `activation_checkpointing`, which is the trainer's.

    A ConfigError says what is not done here.
    """
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import CPUOffloadPolicy
    from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy, transformer_auto_wrap_policy

    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError("accelerate is set to FSDP 1; here it is FSDP 2: `accelerate to-fsdp2` turns a file into one")
    plugin = FullyShardedDataParallelPlugin()
    asked = {
        "cpu_offload": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "activation_checkpointing": bool(plugin.activation_checkpointing),
    }
    if plugin.ignored_modules:
        raise ConfigError("accelerate's settings ask for fsdp_ignored_modules, which dtrain does not do; turn it off")
    found: dict[str, Any] = {"reshard_after_forward": plugin.reshard_after_forward, "min_parameters": None, **asked}
    if str(getattr(plugin.state_dict_type, "name", "")).startswith("FULL"):
        found["state_dict_type"] = "full"
    if plugin.auto_wrap_policy is transformer_auto_wrap_policy:
        found["layers"] = list(plugin.transformer_cls_names_to_wrap or []) or None
    elif plugin.auto_wrap_policy is size_based_auto_wrap_policy:
        found["min_parameters"] = plugin.min_num_params
    return found


def is_shard(value: Any) -> bool:
    """Whether a tensor is this rank's part of a larger one."""
    return hasattr(value, "full_tensor")


def local_part(value: Any) -> Any:
    """The part of a tensor that this rank has; all of one that is not sharded."""
    return value.to_local() if is_shard(value) else value


class Chunk(NamedTuple):
    """This rank's part of a sharded tensor, as a checkpoint keeps it."""

    local: torch.Tensor  # empty where this rank has none
    offsets: tuple[int, ...]  # where it begins in the whole tensor
    is_written_here: bool  # of ranks that have the same part, one writes it


def chunk_of(shard: Any, number: int = 0) -> Chunk:
    """This rank's part of a DTensor, and whether it is this rank that keeps it. All ranks call it in the same order.

    Of parts that several ranks have (copies of the model), each copy keeps some, by the tensor's number.
    """
    if any(placement.is_partial() for placement in shard.placements):
        from torch.distributed.tensor import Replicate

        shard = shard.redistribute(placements=[Replicate()] * shard.device_mesh.ndim)
    mesh, copy, copies = shard.device_mesh, 0, 1
    for dim, placement in enumerate(shard.placements):
        if placement.is_replicate():
            copy, copies = copy * mesh.size(dim) + mesh.get_local_rank(dim), copies * mesh.size(dim)
    (chunk,) = shard.__create_chunk_list__()  # what DTensors tell torch.distributed.checkpoint
    local, is_written = shard.to_local(), number % copies == copy
    is_empty_everywhere = not shard.numel() and not any(chunk.offsets)
    return Chunk(local, tuple(chunk.offsets), is_written and (local.numel() > 0 or is_empty_everywhere))


def is_stored(value: Any) -> bool:
    """Whether a value stands for a tensor in a checkpoint's shards (`dtrain.checkpoint.shards.Stored`)."""
    return hasattr(value, "read_part")


def copies_mistake(copies: int, world_size: int) -> str:
    """Why the ranks cannot hold so many copies of the model; '' where they can."""
    if not world_size % copies:
        return ""
    possible = ", ".join(str(number) for number in range(1, world_size + 1) if not world_size % number)
    text = f"{world_size} ranks cannot hold {copies} copies of the model, each with as many ranks"
    return f"trainer.fsdp.replicate: {text}; possible: {possible}"


class FSDP:
    """Every rank has a part of each weight; all ranks call the model equally often, since each call gathers weights.

    Its methods are those of `DDP`. All ranks call them in the same order. See `fsdp_options`; with `syncs_buffers`,
    every step begins with the main rank's buffers.
    """

    is_sharded = True

    def __init__(self, ranks: Collectives, options: Mapping[str, Any], syncs_buffers: bool = True) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self._ranks, self._options, self._syncs_buffers = ranks, options, syncs_buffers
        self.saves_shards = options.get("state_dict_type") != "full"
        self.must_save_shards = options.get("state_dict_type") == "sharded"
        self._is_amid_step = False  # the next forward is not the first of its step
        self.parameters: dict[str, torch.nn.Parameter] = {}  # nothing numbers them
        self.clock: Any = None  # ranks wait for one another all through a forward
        self._units: list[torch.nn.Module] = []  # of the trained model
        copies = options.get("replicate") or 1
        shape = (copies, ranks.world_size // copies) if copies > 1 else (ranks.world_size,)
        self._mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=("copies", "shards")[-len(shape) :])

    def wrap(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model as the ranks train it: itself, divided."""
        if not any(item.requires_grad for item in model.parameters()):
            return model
        if self._syncs_buffers and any(True for _ in model.buffers()):
            model.register_forward_pre_hook(self._begin_with_same_buffers)
        return self.divide(model)

    def rewrap(self, wrapped: torch.nn.Module, _model: torch.nn.Module) -> torch.nn.Module:
        """As it is: each gathering of weights asks the shards whether they require a gradient."""
        return wrapped

    def with_gradients_apart(self, wrapped: torch.nn.Module, _model: torch.nn.Module) -> torch.nn.Module:
        """The same: they live nowhere else."""
        return wrapped

    def _begin_with_same_buffers(self, model: torch.nn.Module, _inputs: Any) -> None:
        """What DistributedDataParallel does before the first forward of each step."""
        if model.training and not self._is_amid_step:
            self._ranks.agree_on_buffers(model)
        self._is_amid_step = False

    def divide(self, module: torch.nn.Module) -> torch.nn.Module:
        """Leave this rank its part of the main rank's weights, in place; ConfigError for what cannot be divided."""
        from torch.distributed.fsdp import fully_shard

        if scalars := [name for name, item in module.named_parameters() if not item.dim()]:
            raise ConfigError(f"trainer.strategy: fsdp cannot divide {', '.join(scalars)}: give it the shape (1,)")
        if empty := [name for name, item in module.named_parameters() if not item.numel()]:
            raise ConfigError(
                f"trainer.strategy: fsdp cannot divide {', '.join(empty)}, which is empty: make it a buffer"
            )
        least, reshard = self._options.get("min_parameters"), self._options.get("reshard_after_forward")
        self._units = units(module, self._options.get("layers"), MIN_PARAMETERS if least is None else least)
        policies = self._policies()
        for part in self._units:
            self._share_weights(part)
            fully_shard(part, mesh=self._mesh, reshard_after_forward=reshard is not False, **policies)
        self._share_weights(module)
        # The outermost always: else its weights would be whole after an evaluation, and sharded after a step.
        fully_shard(module, mesh=self._mesh, reshard_after_forward=True, **policies)
        return module

    def _share_weights(self, part: torch.nn.Module) -> None:
        """Give every rank the main rank's weights of a part, but for those that are divided already.

        By parts, memory that no rank but the main one has written to (torch.empty) is never there for the whole model.
        """
        for value in part.state_dict().values():
            if isinstance(value, torch.Tensor) and not is_shard(value):
                dist.broadcast(value, src=0)

    def _policies(self) -> dict[str, Any]:
        """In which types weights and gradients travel, and whether shards lie in host memory, as fully_shard takes it.

        Inputs are left as they are: what is computed in bf16, torch.autocast decides, as it does without shards.
        """
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

        dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32, None: None}
        gathered, reduced = (dtypes[self._options.get(key)] for key in ("param_dtype", "reduce_dtype"))
        if gathered is not None and reduced is None:  # where torch would take that of the weights
            reduced = torch.float32
        policies: dict[str, Any] = {}
        if gathered is not None or reduced is not None:
            policies["mp_policy"] = MixedPrecisionPolicy(gathered, reduced, cast_forward_inputs=False)
        if self._options.get("cpu_offload"):
            policies["offload_policy"] = CPUOffloadPolicy(pin_memory=self._ranks.device.type == "cuda")
        return policies

    def compile(self, model: torch.nn.Module, options: Mapping[str, Any]) -> None:
        """Compile, in place, each part that is gathered at a time, or all where that is one: names stay as they are.

        Between the parts, weights are gathered by what torch.compile does not see.
        """
        for part in self._units or [model]:
            part.compile(**options)

    @contextlib.contextmanager
    def no_sync(self, model: Any) -> Iterator[None]:
        """Around a batch that is not the last of its step: gradients are reduced all the same, which saves memory."""
        yield
        self._is_amid_step = True

    def gradients(
        self, loss: torch.Tensor, seed: torch.Tensor, parameters: list[torch.nn.Parameter], retain_graph: bool
    ) -> list[torch.Tensor | None]:
        """The mean over the ranks of a loss's gradients; of a sharded model a backward reduces them, as shards."""
        kept = [item.grad for item in parameters]
        for parameter in parameters:
            parameter.grad = None
        loss.backward(seed, retain_graph=retain_graph)
        found = [item.grad for item in parameters]
        for parameter, gradient in zip(parameters, kept, strict=True):
            parameter.grad = gradient
        whole = [number for number, item in enumerate(parameters) if not is_shard(item)]  # of the loss
        means = self._ranks.average([found[number] for number in whole], [parameters[number] for number in whole])
        for number, mean in zip(whole, means, strict=True):
            found[number] = mean
        return found

    def are_finite(self, gradients: list[torch.Tensor]) -> bool:
        """Not known: a rank has shards of them, and their norm tells all ranks."""
        return False

    def total_norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """The 2-norm of all whole gradients as one vector, the same on every rank; a loss's own are not sharded."""
        parts = [[item for item in gradients if is_shard(item) is sharded] for sharded in (True, False)]
        norms: list[Any] = [torch.nn.utils.get_total_norm(part) for part in parts if part]
        whole = [norm.full_tensor() if is_shard(norm) else norm for norm in norms]
        whole = [norm.to(self._ranks.device) for norm in whole]  # shards may lie in host memory
        return whole[0] if len(whole) == 1 else torch.linalg.vector_norm(torch.stack(whole))

    # torch.distributed.checkpoint.state_dict has functions for what follows. In torch 2.13 they do not do the same:
    # - get_model_state_dict gathers tied weights twice, drops _metadata, refuses sets, dtypes and complex numbers in an
    #   extra state, and on CPUs returns the live buffers, not copies;
    # - set_model_state_dict drops _metadata on all ranks but the main one, and fails for a module with two names;
    # - get_optimizer_state_dict names parameters, where checkpoints number them, and steps an optimizer without state;
    # - set_optimizer_state_dict takes names only (KeyError on the main rank, while the others hang).

    def whole(self, tree: Any) -> Any:
        """The same nested containers with whole tensors in host memory, which nobody else changes, on the main rank.

        They have the same form on all ranks; the other ranks get empty tensors.
        """
        kept: dict[tuple[Any, ...], torch.Tensor] = {}

        def whole(part: Any) -> torch.Tensor:
            value = part.full_tensor() if is_shard(part) else part  # for each, tied or not: all ranks must agree
            if not self._ranks.is_main:
                return torch.empty(0)
            local = local_part(part)
            tied = local.data_ptr() or id(part), local.dtype, tuple(part.shape), local.stride()
            if tied not in kept:
                kept[tied] = value.detach().to("cpu", copy=True)
            return kept[tied]

        result = tree_map_only(torch.Tensor, whole, tree)
        if hasattr(tree, "_metadata"):
            result._metadata = tree._metadata
        return result

    def to_save(self, tree: Any) -> Any:
        """A state_dict or the like as a checkpoint takes it: as it is where every rank saves its shards, else whole."""
        return tree if self.saves_shards else self.whole(tree)

    def here(self, tree: Any) -> Any:
        """The same nested containers with what this rank has of each tensor, without the others; see `joined`."""
        kept: dict[tuple[Any, ...], dict[str, Any]] = {}

        def here(part: torch.Tensor) -> Any:
            if not is_shard(part):
                return part
            local, shape = local_part(part), part.shape
            tied = local.data_ptr() or id(part), local.dtype, tuple(shape), local.stride()
            if tied not in kept:
                kept[tied] = {_SHARD: local.detach(), "shape": list(shape), "offset": _offset(part)}
            return kept[tied]

        result = tree_map_only(torch.Tensor, here, tree)
        if hasattr(tree, "_metadata"):
            result._metadata = tree._metadata
        return result

    def load_weights(self, module: torch.nn.Module, weights: Mapping[str, Any] | None) -> None:
        """Give every rank its part of these weights, which only the main rank has; nothing where they are None.

        Of what is stored in shards, each rank reads its own part.
        """
        outline = {name: value if is_stored(value) else None for name, value in (weights or {}).items()}
        outline = self._ranks.broadcast(None if weights is None else outline)
        if outline is None:
            return
        found = module.state_dict()
        for name, stored in outline.items():
            value, own = None if weights is None else weights[name], found[name]
            if stored is not None:
                found[name] = self._read(stored, own)
            else:
                is_divided = is_shard(own)
                found[name] = self._divided(value, own, own.placements) if is_divided else self._ranks.broadcast(value)
        module.load_state_dict(found)

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any] | None) -> None:
        """Give every rank's optimizer its part of this state, which only the main rank has.

        Each tensor is divided as its parameter is, if that is; one of another shape (Adafactor's rows and columns) is
        left whole.
        """
        from torch.distributed.tensor import Replicate

        def outline(value: torch.Tensor) -> torch.Tensor:
            return value.to("meta") if value.dim() else value

        found = self._ranks.broadcast(None if state is None else tree_map_only(torch.Tensor, outline, dict(state)))
        parameters: list[Any] = [item for group in optimizer.param_groups for item in group["params"]]
        for number, values in found["state"].items():
            for name, value in values.items():
                parameter = parameters[number]
                if is_stored(value):
                    values[name] = self._read(value, parameter)
                elif isinstance(value, torch.Tensor) and value.dim():
                    whole = None if state is None else state["state"][number][name]
                    if not is_shard(parameter):  # of the loss
                        values[name] = self._ranks.broadcast(whole)
                        continue
                    placements = parameter.placements if value.shape == parameter.shape else [Replicate()]
                    values[name] = self._divided(whole, value, placements)
        optimizer.load_state_dict(found)

    def _read(self, stored: Any, like: Any) -> torch.Tensor:
        """This rank's part of a tensor in a checkpoint's shards: divided as `like` is, if that is and has its shape."""
        from torch.distributed.tensor import DTensor, Replicate

        device = self._ranks.device
        if not is_shard(like):
            return stored.read_part().to(device)
        if stored.shape != like.shape:
            whole = [Replicate()] * self._mesh.ndim
            return DTensor.from_local(stored.read_part().to(device), self._mesh, whole, run_check=False)
        chunk = chunk_of(like)
        local = stored.read_part(chunk.offsets, tuple(chunk.local.shape)).to(device)
        shape = {"shape": like.shape, "stride": like.stride()}
        return DTensor.from_local(local, self._mesh, like.placements, run_check=False, **shape)

    def _divided(self, value: torch.Tensor | None, like: torch.Tensor, placements: Any) -> torch.Tensor:
        """This rank's part of a tensor of the main rank (None elsewhere), of the shape and dtype of `like`."""
        from torch.distributed.tensor import distribute_tensor

        whole = torch.empty(like.shape, dtype=like.dtype, device=self._ranks.device)
        return distribute_tensor(whole if value is None else whole.copy_(value), self._mesh, placements)

    def rounds(self, loader: Iterable[tuple[Any, int]], stop: Callable[[], bool]) -> Iterator[tuple[Any, int, bool]]:
        """This rank's batches, each with its samples, and whether to stop before it, which all ranks then do.

        A rank without samples joins the others' collectives with a dummy batch, another's, which has 0 samples here;
        where no rank has any, the batch is None.
        """
        batches, ranks = iter(loader), self._ranks
        while True:
            counted = next(batches, None)
            batch, samples = counted or (None, 0)
            # Four numbers, however many ranks: the last one is largest on the first rank that has samples.
            place = ranks.world_size - ranks.rank if samples else 0
            flags = torch.tensor([counted is not None, stop(), not samples, place], dtype=torch.float64)
            has_batch, stops, has_dummy, first = ranks.max_(flags).tolist()
            if not has_batch:
                return
            dummy = ranks.broadcast(batch, ranks.world_size - int(first)) if first and has_dummy else None
            yield batch if samples else dummy, samples, stops > 0

    def lead(self, module: torch.nn.Module, forward: Forward, work: Callable[[Forward], None]) -> None:
        """Let the main rank do `work(forward)`, which calls `forward(module, batch)`; the others join each call."""
        if self._ranks.is_main:
            work(lambda module, batch: forward(module, self._ranks.broadcast(batch)))
            self._ranks.broadcast(None)
        else:
            while (batch := self._ranks.broadcast()) is not None:
                forward(module, batch)


def _offset(part: Any) -> list[int]:
    """Where in the whole tensor a shard begins, by dimension: torch divides it as torch.chunk does."""
    offset = [0] * part.dim()
    for number, placement in enumerate(part.placements):
        if placement.is_shard():
            size = part.shape[placement.dim]
            rows = -(-size // part.device_mesh.size(number))
            offset[placement.dim] = min(size, rows * part.device_mesh.get_local_rank(number))
    return offset


def joined(parts: Sequence[Any]) -> Any:
    """Whole tensors again of what `FSDP.here` gave on all ranks; where they have it unsharded, the first one's."""
    known: dict[int, Any] = {}

    def join(several: Sequence[Any]) -> Any:
        first = several[0]
        result: Any
        if id(first) in known:
            return known[id(first)]
        if isinstance(first, dict):
            if _SHARD in first:
                result = torch.empty(first["shape"], dtype=first[_SHARD].dtype)
                for each in several:
                    part, offset = each[_SHARD], each["offset"]
                    result[tuple(slice(at, at + size) for at, size in zip(offset, part.shape, strict=True))] = part
            else:
                result = copy.copy(first)  # with the attributes of a state_dict
                for key in first:
                    result[key] = join([each[key] for each in several])
        elif isinstance(first, list | tuple):
            result = type(first)(join(items) for items in zip(*several, strict=True))
        else:
            return first
        known[id(first)] = result
        return result

    return join(parts)


def units(module: torch.nn.Module, layers: list[str] | None, min_parameters: int) -> list[torch.nn.Module]:
    """The parts of a model that are gathered one at a time, inner ones first; the rest goes with the whole.

    By size, only elements of containers are such parts: they are called as modules, while other parts may have their
    weights taken by the module around them, which would find shards. ConfigError where no part is of such a class.
    """
    parts = list(module.modules())[:0:-1]  # without the model itself, those within others before them
    if layers:
        found = [part for part in parts if type(part).__name__ in layers]
        if missing := sorted(set(layers) - {type(part).__name__ for part in found}):
            there = ", ".join(sorted({type(part).__name__ for part in parts}))
            raise ConfigError(f"trainer.fsdp.layers: the model has no {', '.join(missing)}; it has {there}")
        return found
    containers = (torch.nn.ModuleList, torch.nn.Sequential, torch.nn.ModuleDict)
    elements = {item for part in module.modules() if isinstance(part, containers) for item in part.children()}
    names = Counter(item for _, item in module.named_parameters(remove_duplicate=False))
    tied = {item for item, count in names.items() if count > 1}  # those may not lie in two parts
    found, taken = [], set[torch.nn.Parameter]()
    for part in parts:
        own = set(part.parameters())
        is_called = part in elements and type(part).forward is not torch.nn.Module.forward
        if is_called and not own & tied and sum(item.numel() for item in own - taken) >= max(1, min_parameters):
            found.append(part)
            taken |= own
    return found
