"""get_optimizer: what moves the weights; and what a step whose gradient is not finite must not leave behind."""

import inspect
from collections.abc import Iterable

import torch
from ml_collections import ConfigDict
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from dtrain.config.build import build
from dtrain.config.schema import refused
from dtrain.distributed.fsdp import is_shard, local_part


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
        text = f"{config.optimizer.name} evaluates the loss itself, several times per step, which this training loop does not support"
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


def total_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of all gradients as one vector; torch's own function sorts them first, which takes as long again."""
    if len({item.dtype for item in gradients}) > 1:
        return get_total_norm(gradients)
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))


class KeptBuffers:
    """Buffers of floating point as they were after the last good step; a step that is skipped has them put back.

    A forward with NaN would leave it in running statistics for good. Sparse and expanded ones are constants.

    Args:
        buffers: A module's; none, where a bad step ends the training.
    """

    def __init__(self, buffers: Iterable[torch.Tensor]) -> None:
        plain = [buffer for buffer in buffers if buffer.is_floating_point() and buffer.layout == torch.strided]
        self._pairs = [(buffer, buffer.detach().clone()) for buffer in plain if 0 not in buffer.stride()]

    @torch.no_grad()
    def after_step(self, norm: torch.Tensor) -> None:
        """Keep them, or put them back where the norm of the gradients is not finite; the host does not wait for it."""
        if not self._pairs:
            return
        is_good = torch.isfinite(norm)
        for buffer, kept in self._pairs:
            kept.copy_(torch.where(is_good, buffer, kept))
            buffer.copy_(kept)
