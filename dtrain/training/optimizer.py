"""get_optimizer: the optimizer over the parameters that are trained."""

from collections.abc import Mapping
from typing import Any

import torch
from ml_collections import ConfigDict
from torch.optim import Optimizer

from dtrain.config.build import build
from dtrain.config.errors import first_few
from dtrain.config.schema import refused


def get_optimizer(config: ConfigDict, model: torch.nn.Module, loss: torch.nn.Module | None = None) -> Optimizer:
    """Build `optimizer` over the parameters that are trained; those of a loss are a group of their own.

    On a GPU, torch's fused kernels are used where the optimizer has them and the config says nothing: they are the
    fastest, and skip a step with a non-finite gradient without asking the host.

    Raises:
        ConfigError: The name or an argument is wrong, or there is nothing to train.
    """
    modules = [model] if loss is None else [model, loss]
    groups = [group for module in modules if (group := [item for item in module.parameters() if item.requires_grad])]
    if not groups:
        raise refused(config, ("model",), "has no parameters to train")
    parameters: list[Any] = groups[0] if len(groups) == 1 else [{"params": group} for group in groups]
    optimizer = build(config, "optimizer", parameters)
    if not isinstance(optimizer, Optimizer):
        text = f"{config.optimizer.name} made a {type(optimizer).__name__}; expected a torch.optim.Optimizer"
        raise refused(config, ("optimizer", "name"), text)
    on_gpu = groups[0][0].device.type == "cuda"
    chosen = {"fused", "foreach", "capturable", "differentiable"} & set(config.optimizer)
    if on_gpu and not chosen and "fused" in optimizer.defaults and type(optimizer).__module__.startswith("torch."):
        optimizer = build(config, "optimizer", parameters, fused=True)
    start_momentum(optimizer)
    return optimizer


def require_trained(optimizer: Optimizer, module: torch.nn.Module, of_loss: torch.nn.Module | None = None) -> None:
    """Called after a forward pass, which may have made parameters: RuntimeError for those the optimizer cannot know.

    `of_loss` is what the loss holds after that pass, also where it held nothing before.
    """
    known = {id(item) for group in optimizer.param_groups for item in group["params"]}
    modules = {"": module} | ({"loss: ": of_loss} if of_loss is not None else {})
    late = [f"{of}{name}" for of, part in modules.items() for name, item in part.named_parameters()
            if item.requires_grad and id(item) not in known]  # fmt: skip
    if late:
        raise RuntimeError(
            f"made after the optimizer, and so never trained: {first_few(late, 10)}. Make parameters in __init__, or "
            "with torch's lazy modules (LazyLinear, ...) where shapes are not known before the first batch"
        )


def in_the_way_of(optimizer: Optimizer, state: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """A saved state for an optimizer that may compute in another way: fused on a GPU what began on a CPU.

    By these keys torch finds the way that it goes in a step, and the device of a step's number, while what the fused
    way alone understands (`found_inf`) follows from how the optimizer was made.
    """
    if state is None or len(state["param_groups"]) != len(optimizer.param_groups):  # which torch refuses
        return state
    ways = ("fused", "foreach", "capturable", "differentiable")
    own = [{key: group[key] for key in ways if key in group} for group in optimizer.param_groups]
    return {**state, "param_groups": [saved | way for saved, way in zip(state["param_groups"], own, strict=True)]}


def start_momentum(optimizer: Optimizer) -> None:
    """Let fused SGD's momentum begin at zero, from which the first step makes the gradient, as without it.

    torch leaves it as whatever lay in memory where the first step is skipped (torch/optim/sgd.py, _fused_sgd), as
    fp16's often is. With dampening zero would be another beginning: there the host looks before it steps.
    """
    for group in optimizer.param_groups if isinstance(optimizer, torch.optim.SGD) else []:
        if not group["fused"] or not group["momentum"]:
            continue
        if group["dampening"]:
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
            continue
        for parameter in group["params"]:
            if optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
