"""Which code runs: commit, state of the working tree, what differs; asks git."""

import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from dtrain.tracking.secrets import redact

# Where a job was submitted, this was captured then: it runs a copy, and the working tree may have changed since.
VARIABLE = "DTRAIN_CODE_STATE"
_TAGS, _COMMIT, _STATUS = "tags.json", "commit.txt", "status.txt"
_HASH = r"[0-9a-f]{40,64}"
_DIFF_BYTES = 5 * 2**20
_SOURCES = {".py", ".pyi", ".pyx", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".toml", ".cfg"}
_SOURCE_BYTES = 2**20  # of files that git does not know, together
# What trainings leave does not count as a change of the code: MLflow's store, and folders with one of the marks.
_STORES = {"__pycache__", "mlruns", "mlartifacts", "mlflow.db", ".mlflow.db.lock"}
_MARKS = ("metrics.jsonl", "job.sbatch", "sweep/trials.csv", "reproduction.json")


def capture_code(place: Path) -> dict[str, str]:
    """Writes which code runs (commit, state of the working tree, what differs) into a folder; returns tags for it.

    What is there already was captured for the same start, before anybody edited a file, and stays.
    """
    place.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):
        return _tags((place / _COMMIT).read_text().strip(), (place / _STATUS).read_text())
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
    commit, status = _git("rev-parse", "HEAD").strip(), ""
    if re.fullmatch(_HASH, commit):
        unknown = _unknown_files()
        status = redact("".join(_without_outputs(_git("status", "--porcelain"), unknown)))
        (place / _STATUS).write_text(status)
        (place / "folder.txt").write_text(_git("rev-parse", "--show-prefix"))  # of the repository, in which it started
        patch = _git("diff", "--no-ext-diff", "--no-textconv", "HEAD") + "".join(_as_patch(unknown))
        (place / "diff.patch").write_text(redact(patch))
        (place / _COMMIT).write_text(f"{commit}\n")  # the last one: with it, all is there
    else:
        (place / _COMMIT).write_text(f"no git commit in {Path.cwd()}: {redact(commit)}\n")
    return _tags(commit, status)


def _unknown_files() -> list[str]:
    """The files that git does not know, from the repository's top, without what trainings leave."""
    top = Path(_git("rev-parse", "--show-toplevel").strip())
    names = _git("ls-files", "--others", "--exclude-standard", "--full-name", "-z", ":/").split("\0")

    @functools.cache
    def is_output(place: Path) -> bool:
        if place == Path():
            return False
        return place.name in _STORES or any((top / place / mark).exists() for mark in _MARKS) or is_output(place.parent)

    return [name for name in names if name and not is_output(Path(name))]


def _without_outputs(status: str, unknown: Sequence[str]) -> Iterator[str]:
    """The lines of git's status but those of files and folders in which there is nothing but what trainings leave."""
    for line in status.splitlines(keepends=True):
        path = line[3:].rstrip("\n")
        if not line.startswith("?? ") or path.startswith('"') or any(name.startswith(path) for name in unknown):
            yield line


def _as_patch(names: Sequence[str]) -> Iterator[str]:
    """Source files that git does not know, as a diff that makes them: without them a commit may not run."""
    top, left = Path(_git("rev-parse", "--show-toplevel").strip()), _SOURCE_BYTES
    for name in [name for name in names if re.fullmatch(r"[\w./+-]+", name) and Path(name).suffix in _SOURCES]:
        try:
            content = (top / name).read_bytes()
            text = content.decode() if len(content) <= left else ""
        except (OSError, ValueError):
            continue
        left -= len(text.encode())
        if text:
            lines = text.split("\n")
            end = "" if text.endswith("\n") else "\\ No newline at end of file\n"
            lines = lines[:-1] if text.endswith("\n") else lines
            body = "".join(f"+{line}\n" for line in lines) + end
            head = f"diff --git a/{name} b/{name}\nnew file mode 100644\n--- /dev/null\n+++ b/{name}\n"
            yield f"{head}@@ -0,0 +1,{len(lines)} @@\n{body}"


def _tags(commit: str, status: str) -> dict[str, str]:
    if not re.fullmatch(_HASH, commit):
        return {}
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
