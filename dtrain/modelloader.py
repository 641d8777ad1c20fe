"""get_model: the network that the config names; knows no loss, no optimizer, no rank."""

import torch
from ml_collections import ConfigDict

from dtrain.build import build
from dtrain.sections import refused


def get_model(config: ConfigDict) -> torch.nn.Module:
    """Build `model`.

    Raises:
        ConfigError: The name or an argument is wrong, or what was built is no torch.nn.Module.
    """
    model = build(config, "model")
    if not isinstance(model, torch.nn.Module):
        text = f"{config.model.name} made a {type(model).__name__}; expected a torch.nn.Module"
        raise refused(config, ("model", "name"), text)
    return model


def fitted(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights under this model's names, where a file has it as a part named `model` beside a loss's own tensors.

    So are PIDNet's published files. Weights that are this model's by their names already are returned as they are.
    """
    own, prefix = set(model.state_dict()), "model."
    inside = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    return inside if own and own <= inside.keys() and not own <= weights.keys() else weights


def misfits_of(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> list[str]:
    """What keeps weights from being this model's, one line each; none when they fit exactly."""
    own = model.state_dict()
    lines = [f"missing in the file: {name} {tuple(own[name].shape)}" for name in own if name not in weights]
    lines += [f"not in the model: {name} {tuple(weights[name].shape)}" for name in weights if name not in own]
    lines += [
        f"other shape: {name} is {tuple(weights[name].shape)} in the file, {tuple(value.shape)} in the model"
        for name, value in own.items()
        if name in weights and isinstance(value, torch.Tensor) and weights[name].shape != value.shape
    ]
    return lines


def parameter_count(model: torch.nn.Module) -> tuple[int, int]:
    """All parameters, and those that are trained."""
    sizes = [(item.numel(), item.requires_grad) for item in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)
