"""A hook of mkdocs: links to files outside docs/, which the site has not, become their names."""

import re
from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    """`[text](../path)` becomes `text` (`path`)."""
    return re.sub(r"\[([^\]]+)\]\(\.\./([^)]+)\)", _name, markdown)


def _name(link: re.Match[str]) -> str:
    text, path = link.groups()
    return text if path in text else f"{text} (`{path}`)"
