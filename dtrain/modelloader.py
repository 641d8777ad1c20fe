"""get_model: the network that the config names; knows no loss, no optimizer, no rank."""

import torch
from ml_collections import ConfigDict

from dtrain.config.build import build
from dtrain.config.schema import refused


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


def parameter_count(model: torch.nn.Module) -> tuple[int, int]:
    """All parameters, and those that are trained."""
    sizes = [(item.numel(), item.requires_grad) for item in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)
