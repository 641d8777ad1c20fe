"""get_optimizer: the optimizer over the parameters that are trained."""

import inspect

import torch
from ml_collections import ConfigDict
from torch.optim import Optimizer

from dtrain.config.build import build
from dtrain.config.schema import refused


def get_optimizer(config: ConfigDict, model: torch.nn.Module) -> Optimizer:
    """Build `optimizer` over the parameters that are trained.

    On a GPU, torch's fused kernels are used where the optimizer has them and the config says nothing: they are the
    fastest, and skip a step with a non-finite gradient without asking the host.

    Raises:
        ConfigError: The name or an argument is wrong, or there is nothing to train.
    """
    parameters = [item for item in model.parameters() if item.requires_grad]
    if not parameters:
        raise refused(config, ("model",), "has no parameters to train")
    optimizer = build(config, "optimizer", parameters)
    if not isinstance(optimizer, Optimizer):
        text = f"{config.optimizer.name} made a {type(optimizer).__name__}; expected a torch.optim.Optimizer"
        raise refused(config, ("optimizer", "name"), text)
    if any(item.default is item.empty for item in inspect.signature(optimizer.step).parameters.values()):
        text = f"{config.optimizer.name} evaluates the loss itself, several times per step, which is not supported"
        raise refused(config, ("optimizer", "name"), text)
    on_gpu = parameters[0].device.type == "cuda"
    chosen = {"fused", "foreach", "capturable", "differentiable"} & set(config.optimizer)
    if on_gpu and not chosen and "fused" in optimizer.defaults and type(optimizer).__module__.startswith("torch."):
        optimizer = build(config, "optimizer", parameters, fused=True)
    _start_momentum(optimizer)
    return optimizer


def _start_momentum(optimizer: Optimizer) -> None:
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
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
