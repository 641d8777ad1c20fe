"""Which code runs: commit, state of the working tree, what differs; asks git."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from dtrain.tracking.secrets import redact

# Where a job was submitted, this was captured then: it runs a copy, and the working tree may have changed since.
VARIABLE = "DTRAIN_CODE_STATE"
_TAGS = "tags.json"
_DIFF_BYTES = 5 * 2**20


def capture_code(place: Path) -> dict[str, str]:
    """Writes which code runs (commit, state of the working tree, what differs) into a folder; returns tags for it."""
    place.mkdir(parents=True, exist_ok=True)
    if captured := os.environ.get(VARIABLE):
        with contextlib.suppress(OSError, ValueError):  # gone or cut short: then what is here says more than nothing
            tags: dict[str, str] = json.loads((Path(captured) / _TAGS).read_text())
            shutil.copytree(captured, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns(_TAGS))
            return tags
    return _ask_git(place)


def capture_code_for_later(place: Path) -> None:
    """The same for a job to come, which finds the folder by the variable."""
    place.mkdir(parents=True)
    (place / _TAGS).write_text(json.dumps(_ask_git(place)))


def _ask_git(place: Path) -> dict[str, str]:
    commit = _git("rev-parse", "HEAD").strip()
    if not re.fullmatch(r"[0-9a-f]{40,64}", commit):
        (place / "commit.txt").write_text(f"no git commit in {Path.cwd()}: {redact(commit)}\n")
        return {}
    status = _git("status", "--porcelain")
    (place / "commit.txt").write_text(f"{commit}\n")
    (place / "status.txt").write_text(redact(status))
    (place / "diff.patch").write_text(redact(_git("diff", "--no-ext-diff", "--no-textconv", "HEAD")))
    return {"mlflow.source.git.commit": commit, "dtrain.code_changed": str(bool(status.strip()))}


def _git(*arguments: str) -> str:
    """What git prints, its beginning at most, or what it says against it; never for long and never with a question."""
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
    with tempfile.TemporaryFile() as output:
        try:
            subprocess.run(
                ["git", *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=10,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"git {arguments[0]}: {error}"
        output.seek(0)
        return output.read(_DIFF_BYTES).decode("utf-8", "replace")
