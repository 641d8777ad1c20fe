"""dtrain trains PyTorch models from one YAML file; importing it imports nothing: what it offers comes when asked."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dtrain.config.errors import ConfigError
    from dtrain.config.load import load_config
    from dtrain.trainer import Trainer
    from dtrain.training.setup import create_trainer

__version__ = "0.1.0"
__all__ = ["ConfigError", "Trainer", "__version__", "create_trainer", "load_config"]


def __getattr__(name: str) -> Any:
    """Import torch only for those who train, and ml_collections only for those who read a config."""
    if name == "load_config":
        from dtrain.config.load import load_config

        return load_config
    if name == "ConfigError":
        from dtrain.config.errors import ConfigError

        return ConfigError
    if name == "create_trainer":
        from dtrain.training.setup import create_trainer

        return create_trainer
    if name == "Trainer":
        from dtrain.trainer import Trainer

        return Trainer
    raise AttributeError(f"module 'dtrain' has no attribute {name!r}")
