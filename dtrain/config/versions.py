"""The version of a config: one of a newer dtrain is refused, of one of an older it is told what has changed since."""

from ml_collections import ConfigDict

from dtrain.config.errors import Mistake
from dtrain.config.load import place_of

CONFIG_VERSION = 1  # raised where a key that is written today comes to mean something else
CHANGED: dict[int, str] = {}  # by the version that brought it: what older configs mean by it now


def newer_version(config: ConfigDict) -> Mistake | None:
    """A mistake where the config was written for a dtrain that knows more."""
    version = config.get("config_version")
    if type(version) is not int or version <= CONFIG_VERSION:
        return None
    text = f"this dtrain knows configs up to version {CONFIG_VERSION}, and this one is of version {version}: "
    return Mistake(f"config_version: {text}install a newer dtrain", place_of(config, ("config_version",)))


def changes_since(config: ConfigDict) -> list[str]:
    """A line for each change of meaning since the version that the config names."""
    version = config.get("config_version")
    later = sorted(number for number in CHANGED if type(version) is int and number > version)
    return [f"config_version {version}: since version {number}, {CHANGED[number]}" for number in later]
