"""Masks what looks like a credential, before it is written anywhere."""

import functools
import io
import os
import re
from collections.abc import Iterator
from typing import IO, Any

_NAMED = r"(?:password|passwd|secret|(?:api|secret|access)_?key|(?:auth|access|api)_?token)"
_TOKEN = r"(?=[A-Za-z.~+/_-]*\d)[\w.~+/-]{16,}+"
_SECRETS = (
    # a password in an address, a credential in its query
    (re.compile(r"(?<=://)[^\s/'\"]+@"), "***@"),
    (re.compile(r"(?i)([?&][\w-]{0,40}(?:password|token|secret|key|signature|sig)=)[^&\s'\"]+"), r"\1***"),
    # `password: ...` in a text, and a header
    (re.compile(rf"(?i)({_NAMED}['\"]?\s*[=:]\s*(['\"]))(?:\\.|(?!\2)[^\n\\])+(?=\2)"), r"\1***"),
    (re.compile(rf"(?i)({_NAMED}['\"]?\s*[=:]\s*['\"]?)[^\s'\",;]+"), r"\1***"),
    # `token: ...` may be a model's, a figure or a call; of one that is long and has digits, that is not to be believed
    (
        re.compile(rf"(?i)(token['\"]?\s*[=:]\s*['\"]?)(?!\d[\d.]*(?:e[+-]?\d+)?\b)(?![\w.]+\()(?:{_TOKEN})"),
        r"\1***",
    ),
    (re.compile(r"(?i)(bearer\s+)[\w.~+/=-]{16,}"), r"\1***"),
    # tokens known by how they begin: GitHub, GitLab, Hugging Face, OpenAI, Slack, Databricks, AWS
    (
        re.compile(r"\b(?:gh[opsu]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|hf_[A-Za-z0-9]{20,}"
                   r"|sk-[\w-]{20,}|xox[abp]-[\w-]{12,}|dapi[0-9a-f]{20,}|AKIA[A-Z0-9]{12,})"),
        "***",
    ),
)  # fmt: skip
_NAMES = r"(?i)(^|[_.-])(password|passwd|secret|{}(api|access|secret)_?key(_id)?)(\.\d+)*$"
_SECRET_NAME = re.compile(_NAMES.format("token|"))
_SECRET_NUMBER = re.compile(_NAMES.format(""))  # a model's token may well be a number, or a word
_LEAST_LETTERS = 8  # of a value that is masked wherever it stands
_known: set[str] = set()


@functools.cache
def _secrets_of_environment() -> tuple[str, ...]:
    return tuple(
        value for name, value in os.environ.items() if len(value) >= _LEAST_LETTERS and _SECRET_NAME.search(name)
    )


def is_secret(key: str, value: Any) -> bool:
    """Whether a value is one that its key's name calls secret; of a list's entries, the list's name counts."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _SECRET_NUMBER.search(key) is not None
    return isinstance(value, str) and value != "" and _SECRET_NAME.search(key) is not None


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values in a nest of mappings and lists with their keys, such as optimizer.lr and a.0; empty ones included."""
    if hasattr(value, "items") and len(value):
        inner = value.items()
    elif isinstance(value, list | tuple) and value:
        inner = enumerate(value)
    else:
        yield prefix, value
        return
    for key, item in inner:
        yield from leaves(item, f"{prefix}.{key}" if prefix else str(key))


def keep_secret(config: Any) -> None:
    """From now on `redact` masks the secrets of this nest of mappings and lists wherever they stand."""
    for key, value in leaves(config):
        text = str(value)  # of `cls_token: learnable` the word is not to be taken out of everything
        is_long = re.fullmatch(_TOKEN, text) or (_SECRET_NUMBER.search(key) and len(text) >= _LEAST_LETTERS)
        if is_long and is_secret(key, value):
            _known.add(text)


def secrets_for_child() -> dict[str, str]:
    """Variables from which a process that is started with them knows the same secrets as this one."""
    return {f"DTRAIN_{number}_SECRET": value for number, value in enumerate(sorted(_known))}


def redact(text: str) -> str:
    """Replaces by *** what looks like a credential, and what the environment or the config calls one."""
    for value in sorted({*_secrets_of_environment(), *_known}, key=len, reverse=True):  # one may begin like another
        text = text.replace(value, "***")
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def redacted_tree(value: Any, key: str = "") -> Any:
    """The same nest of mappings and lists, its texts without secrets, and nothing at all under a secret's name."""
    if isinstance(value, dict):
        return {name: redacted_tree(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted_tree(item, key) for item in value]
    if is_secret(key, value):
        return "***"
    return redact(value) if isinstance(value, str) else value


class Redacted(io.TextIOBase):
    """A stream without secrets: mlflow and the libraries under it print addresses as they were given."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes it masked."""
        self._stream.write(redact(text))
        return len(text)

    def flush(self) -> None:
        """Passes it on."""
        self._stream.flush()
