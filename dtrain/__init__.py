"""dtrain trains PyTorch models from one YAML file; importing it imports nothing: what it offers comes when asked."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dtrain.config.errors import ConfigError
    from dtrain.config.load import load_config
    from dtrain.trainer import Trainer, create_trainer
    from dtrain.training.saved_model import load_model

__version__ = "0.1.0"
__all__ = ["ConfigError", "Trainer", "__version__", "create_trainer", "load_config", "load_model"]


def __getattr__(name: str) -> Any:
    """Import torch only for those who train, and ml_collections only for those who read a config."""
    if name in ("load_config", "ConfigError"):
        from dtrain import config as place
    elif name in ("create_trainer", "Trainer"):
        from dtrain import trainer as place  # type: ignore[no-redef]
    elif name == "load_model":
        from dtrain.training import saved_model as place  # type: ignore[no-redef]
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(place, name)
