"""From YAML to objects: read, check everything at once, build. The YAML parser is imported when it is asked for."""

from typing import TYPE_CHECKING, Any

from dtrain.config.errors import ConfigError

if TYPE_CHECKING:
    from dtrain.config.load import load_config

__all__ = ["ConfigError", "load_config"]


def __getattr__(name: str) -> Any:
    if name != "load_config":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dtrain.config.load import load_config

    return load_config
