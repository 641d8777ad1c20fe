"""What looks like a credential is masked here, before it is written anywhere; knows nothing of where it goes."""

import functools
import io
import os
import re
from typing import IO, Any

_SECRETS = (
    # a password in an address, a credential in its query
    (re.compile(r"(?<=://)[^\s/'\"]+@"), "***@"),
    (re.compile(r"(?i)([?&][\w-]{0,40}(?:password|token|secret|key|signature|sig)=)[^&\s'\"]+"), r"\1***"),
    # `password: ...` in a text, and a header
    (
        re.compile(r"(?i)((?:password|passwd|secret|(?:api|secret|access)_?key|(?:auth|access|api)_?token)"
                   r"['\"]?\s*[=:]\s*['\"]?)[^\s'\",;]+"),
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
SECRET_NAME = re.compile(r"(?i)(^|[_.-])(password|passwd|secret|token|(api|access|secret)_?key(_id)?)$")


@functools.cache
def _secrets_of_environment() -> tuple[str, ...]:
    return tuple(value for name, value in os.environ.items() if len(value) >= 8 and SECRET_NAME.search(name))


def redact(text: str) -> str:
    """Replaces by *** what looks like a credential, and the value of any environment variable named like one."""
    for value in _secrets_of_environment():
        text = text.replace(value, "***")
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def redacted_tree(value: Any, key: str = "") -> Any:
    """The same nest of mappings and lists, its texts without secrets, and no text at all under a secret's name."""
    if isinstance(value, dict):
        return {name: redacted_tree(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted_tree(item, key) for item in value]
    if isinstance(value, str):
        return "***" if value and SECRET_NAME.search(key) else redact(value)
    return value


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
