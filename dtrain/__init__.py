"""dtrain trains PyTorch models from one YAML file; importing it imports neither torch nor any room but config."""

from typing import TYPE_CHECKING, Any

from dtrain.config import load_config
from dtrain.yamlfile import ConfigError

if TYPE_CHECKING:
    from dtrain.create import create_trainer
    from dtrain.trainer import Trainer

__version__ = "0.1.0"
__all__ = ["ConfigError", "Trainer", "__version__", "create_trainer", "load_config"]


def __getattr__(name: str) -> Any:
    """Import torch only for those who train."""
    if name == "create_trainer":
        from dtrain.create import create_trainer

        return create_trainer
    if name == "Trainer":
        from dtrain.trainer import Trainer

        return Trainer
    raise AttributeError(f"module 'dtrain' has no attribute {name!r}")
