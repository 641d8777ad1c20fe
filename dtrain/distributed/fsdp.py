"""A model shared out over the ranks (FSDP2): each holds a part of every weight. Knows no training, files or config.

What is written and read are whole weights, in the form that one process has: gathered on the main rank, tensor by
tensor, and dealt out from there. accelerate's FSDP settings are honoured; the sharding itself is torch's own
`fully_shard`, since accelerate 1.15 does none without a GPU, and its rule by size fails at a ModuleList.
"""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from dtrain.config.errors import ConfigError

MIN_PARAMETERS = 1_000_000  # smaller parts are not worth a message of their own


def fsdp_options(
    *, layers: list[str] | None = None, min_parameters: int | None = None, reshard_after_forward: bool | None = None
) -> dict[str, Any]:
    """The keys under `trainer.fsdp`: what is gathered at a time.

    Args:
        layers: Class names of the parts that are gathered one by one. Default: by size.
        min_parameters: Without `layers`, the elements of a ModuleList or Sequential with at least so many.
        reshard_after_forward: Let go of a part's weights until the backward pass (default true); false takes memory
            and saves messages.
    """
    return dict(locals())


def launcher_strategy() -> str | None:
    """The strategy that `accelerate launch` was asked for: fsdp; None when it was not."""
    return "fsdp" if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes") else None


def settings_of_accelerate() -> dict[str, Any]:
    """What accelerate's FSDP settings say, as `fsdp_options`.

    Raises:
        ConfigError: They ask for what is not done here.
    """
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import CPUOffloadPolicy
    from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy, transformer_auto_wrap_policy

    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError("accelerate is set to FSDP 1; here it is FSDP 2: `accelerate to-fsdp2` turns a file into one")
    plugin = FullyShardedDataParallelPlugin()
    asked = {
        "fsdp_offload_params": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "fsdp_activation_checkpointing": plugin.activation_checkpointing,
        "fsdp_ignored_modules": plugin.ignored_modules,
    }
    if unknown := [key for key, wish in asked.items() if wish]:
        raise ConfigError(f"accelerate's settings ask for {', '.join(unknown)}, which dtrain does not do; turn it off")
    found: dict[str, Any] = {"reshard_after_forward": plugin.reshard_after_forward, "min_parameters": None}
    if plugin.auto_wrap_policy is transformer_auto_wrap_policy:
        found["layers"] = list(plugin.transformer_cls_names_to_wrap or []) or None
    elif plugin.auto_wrap_policy is size_based_auto_wrap_policy:
        found["min_parameters"] = plugin.min_num_params
    return found


def is_shard(value: Any) -> bool:
    """Whether a tensor is this rank's part of a larger one."""
    return hasattr(value, "full_tensor")


def local_part(value: Any) -> Any:
    """The part of a tensor that this rank has; all of one that is not shared out."""
    return value.to_local() if is_shard(value) else value


class Shards:
    """How models are shared out over all ranks. All ranks call the same methods in the same order.

    Args:
        device: Of this rank.
        world_size: How many ranks there are.
        options: See `fsdp_options`.
        syncs_buffers: Whether every step begins with rank 0's buffers.
    """

    def __init__(
        self, device: torch.device, world_size: int, options: Mapping[str, Any], syncs_buffers: bool = True
    ) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self._options, self._device, self.syncs_buffers = options, device, syncs_buffers
        self.is_amid_step = False  # the next forward is not the first of its step
        self._mesh = init_device_mesh(device.type, (world_size,))

    def share_out(self, module: torch.nn.Module) -> torch.nn.Module:
        """Leave this rank its part of every parameter, in place; the module has the same weights on all ranks.

        Raises:
            ConfigError: A parameter has no dimension to be divided along, or there is no such layer.
        """
        from torch.distributed.fsdp import fully_shard

        if scalars := [name for name, item in module.named_parameters() if not item.dim()]:
            raise ConfigError(f"trainer.strategy: fsdp cannot divide {', '.join(scalars)}: give it the shape (1,)")
        reshard = self._options.get("reshard_after_forward")
        for part in [*units(module, **_chosen(self._options)), module]:
            # The outermost, too: else its weights would be whole after an evaluation, and shards after a step.
            fully_shard(part, mesh=self._mesh, reshard_after_forward=True if part is module else reshard is not False)
        return module

    @contextlib.contextmanager
    def amid_step(self) -> Iterator[None]:
        """Around a batch that is not the last of its step; its gradients are reduced all the same, and take no room."""
        yield
        self.is_amid_step = True

    @staticmethod
    def total_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
        """The 2-norm of all whole gradients as one vector, the same on every rank."""
        norm: Any = torch.nn.utils.get_total_norm(gradients)
        return norm.full_tensor() if is_shard(norm) else norm

    def whole(self, tree: Any, keeps: bool) -> Any:
        """The same nested containers with whole tensors in host memory, which nobody else changes.

        Args:
            tree: Such as a state_dict; of the same form on all ranks.
            keeps: Whether this rank wants them; else its tensors are empty.
        """
        from torch.utils._pytree import tree_map_only

        kept: dict[tuple[Any, ...], torch.Tensor] = {}

        def whole(part: Any) -> torch.Tensor:
            value = part.full_tensor() if is_shard(part) else part  # for each, tied or not: all ranks must agree
            if not keeps:
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

    def load_weights(self, module: torch.nn.Module, weights: Mapping[str, Any] | None, broadcast: Any) -> None:
        """Deal out whole weights, which the main rank alone has (None elsewhere)."""
        found = module.state_dict()
        names = broadcast(None if weights is None else list(weights))
        for name in names or ():
            given = None if weights is None else weights[name]
            found[name] = self._dealt(given, found[name], broadcast)
        if names is not None:
            module.load_state_dict(found)

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any] | None, broadcast: Any) -> None:
        """Deal out an optimizer's whole state, which the main rank alone has; each tensor goes as its parameter does.

        What has another shape than its parameter (Adafactor's rows and columns) is left whole on every rank.
        """
        from torch.distributed.tensor import Replicate
        from torch.utils._pytree import tree_map_only

        def outline(value: torch.Tensor) -> torch.Tensor:
            return value.to("meta") if value.dim() else value

        told = broadcast(None if state is None else tree_map_only(torch.Tensor, outline, dict(state)))
        parameters: list[Any] = [item for group in optimizer.param_groups for item in group["params"]]
        for number, values in told["state"].items():
            for name, value in values.items():
                if isinstance(value, torch.Tensor) and value.dim():
                    like = parameters[number]
                    placements = like.placements if value.shape == like.shape else [Replicate()]
                    values[name] = self._distributed(state["state"][number][name] if state else value, placements)
        optimizer.load_state_dict(told)

    def _dealt(self, value: Any, like: Any, broadcast: Any) -> Any:
        """This rank's part of an entry of a state_dict: `like` is the entry that it takes the place of."""
        if is_shard(like):
            return self._distributed(like.to("meta") if value is None else value, like.placements, like.dtype)
        return broadcast(value)

    def _distributed(self, value: Any, placements: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        from torch.distributed.tensor import distribute_tensor

        empty = torch.empty(value.shape, dtype=dtype or value.dtype, device=self._device)
        return distribute_tensor(empty if value.is_meta else empty.copy_(value), self._mesh, placements)


def _chosen(options: Mapping[str, Any]) -> dict[str, Any]:
    least = options.get("min_parameters")
    return {"layers": options.get("layers"), "min_parameters": MIN_PARAMETERS if least is None else least}


def units(module: torch.nn.Module, layers: list[str] | None, min_parameters: int) -> list[torch.nn.Module]:
    """The parts of a model that are gathered one at a time, inner ones first; the rest goes with the whole.

    By size, only elements of containers are such parts: they are called as modules, while other parts may have their
    weights taken by the module around them, which would find shards.

    Raises:
        ConfigError: No part is of such a class.
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
