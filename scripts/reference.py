"""Write docs/reference.md: every key that dtrain itself knows, from signatures, docstrings and ranges.

python scripts/reference.py          # write it
python scripts/reference.py --check  # say whether it is up to date
"""

import sys
from pathlib import Path
from typing import Any

from dtrain.config.json_schema import TEXTS, own_keys
from dtrain.config.rules import RANGES, TOP_LEVEL
from dtrain.config.schema import OWN_SETTINGS

PAGE = Path(__file__).parent.parent / "docs" / "reference.md"
HEAD = """\
# Config reference

Every key that dtrain itself knows: its type, default and meaning. `scripts/reference.py` writes this page from the
signatures and docstrings that check a config, so it cannot differ from what is taken.
[configfiles/reference.yaml](../configfiles/reference.yaml) is the same as a config that trains. Keys of components
(model, dataset, loss, metric, optimizer, scheduler) are the arguments of what `name` leads to;
[`dtrain schema`](editors.md) has them as well.

## Top level

| Key | Meaning |
|---|---|
"""
WHERE = {  # where the keys of a group stand, if not in the section of that name
    "loader": "loaders",
    "folds": "loaders.folds",
    "groups": "optimizer",
    "schedule": "lr_scheduler",
    "metric": "metrics",
}
OWN = "The settings below."
OF_TRAINER = ("ddp", "fsdp", "swa", "pictures", "pre_trained", "freeze", "profile")


def page() -> str:
    """The whole page."""
    text = HEAD + "".join(f"| `{key}` | {cell(TEXTS.get(key, OWN))} |\n" for key in TOP_LEVEL)
    for settings in OWN_SETTINGS:
        where = WHERE.get(settings, f"trainer.{settings}" if settings in OF_TRAINER else settings)
        keys = own_keys(settings)
        text += f"\n## {where}\n\n{keys.summary}\n\n| Key | Type | Default | Meaning |\n|---|---|---|---|\n"
        for key, item in keys.properties.items():
            default = f"`{shown(item['default'])}`" if "default" in item else "required"
            said = cell(item.get("description", ""))
            text += f"| `{key}` | {kind(item)}{limits(item)} | {default} | {said} |\n"
    return text


def kind(schema: dict[str, Any]) -> str:
    """A type in a few words; references and null, which the default tells, are left out."""
    parts: list[str] = []
    for item in schema.get("anyOf", [schema]):
        types = item.get("type", [])
        if "enum" in item:
            parts += [f"`{shown(value)}`" for value in item["enum"]]
        elif item.get("type") == "array":
            parts.append("list")
        elif "$ref" in item:
            parts.append({"component": "component", "value": "any"}.get(item["$ref"].rpartition("/")[2], "mapping"))
        elif "pattern" not in item:
            names = [types] if isinstance(types, str) else types
            parts += ["mapping" if name == "object" else name for name in names if name != "null"]
    return ", ".join(dict.fromkeys(parts)) or "any"


def limits(schema: dict[str, Any]) -> str:
    """The range of a number."""
    least, most = schema.get("minimum"), schema.get("maximum")
    return "" if least is None else f", {least:g} to {most:g}" if most is not None else f", at least {least:g}"


def shown(value: Any) -> str:
    """A value as YAML has it."""
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def cell(text: str) -> str:
    """A text in a table."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    assert set(RANGES) - {""} <= {*OWN_SETTINGS, "loaders", "optimizer", "lr_scheduler"}
    if "--check" in sys.argv:
        sys.exit(0 if PAGE.read_text() == page() else f"{PAGE} is out of date: python scripts/reference.py")
    PAGE.write_text(page())
