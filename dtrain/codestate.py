"""Which code runs: commit, state of the working tree, what differs; asks git alone, and knows nothing of MLflow."""

import os
import re
import subprocess
import tempfile
from pathlib import Path

from dtrain.redact import redact

_DIFF_BYTES = 5 * 2**20


def capture_code(place: Path) -> dict[str, str]:
    """Writes which code runs (commit, state of the working tree, what differs) into a folder; returns tags for it."""
    place.mkdir(parents=True, exist_ok=True)
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
