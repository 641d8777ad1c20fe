"""From YAML to objects: read, check everything at once, build. What is named here is imported when it is asked for."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dtrain.config.errors import ConfigError
    from dtrain.config.load import load_config

__all__ = ["ConfigError", "load_config"]


def __getattr__(name: str) -> Any:
    if name == "load_config":
        from dtrain.config.load import load_config

        return load_config
    if name == "ConfigError":
        from dtrain.config.errors import ConfigError

        return ConfigError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
