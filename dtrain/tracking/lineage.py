"""Which data a run had: of each set its name, a digest and its size, from what the journal says and the files hold."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_READ_BYTES = 64 * 2**20  # files of a set are read whole where they have no more together
_MOST_FILES = 100_000
_IS_PATH_KEY = re.compile(r"(?i)(^|_)(path|paths|file|files|dir|folder|root|images?|labels?|masks?)$")
_LONGEST = 60_000  # characters of a source, of which MLflow takes 65,535


def lineage(sets: Mapping[str, Mapping[str, Any]], folder: Path) -> list[dict[str, str]]:
    """For each set by name (train, val/near, ...) what MLflow's dataset holds: name, digest, source, profile, ...

    The digest changes with the class, its arguments, the number of samples, and the files that the arguments name,
    against `folder` where they are relative: with their contents as far as `_READ_BYTES` go, else with each one's path,
    size and time of change.
    """
    return [_of_one(context, dict(facts), folder) for context, facts in sets.items()]


def _of_one(context: str, facts: dict[str, Any], folder: Path) -> dict[str, str]:
    files = sorted(set(_files(facts.get("arguments", {}), folder)))[:_MOST_FILES]
    known = [(file, file.stat()) for file in files]
    size = sum(stat.st_size for _, stat in known)
    is_read = size <= _READ_BYTES
    whole = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for file, stat in known:
        by = hashlib.sha256(file.read_bytes()).hexdigest() if is_read else f"{stat.st_size} {stat.st_mtime_ns}"
        whole.update(f"{os.path.relpath(file, folder)} {by}\n".encode(errors="surrogateescape"))
    profile: dict[str, Any] = {"samples": facts.get("samples"), "num_rows": facts.get("samples")}
    if files:
        how = "their contents" if is_read else "their paths, sizes and times of change"
        profile |= {"files": len(files), "bytes": size, "digest": f"of class, arguments, samples, and of files {how}"}
    where = os.path.commonpath(files) if files else ""
    source: dict[str, Any] = {"uri": where} if files else {"tags": {"mlflow.source.name": facts.get("class", "")}}
    source |= {"class": facts.get("class"), "arguments": facts.get("arguments")}
    return {
        "context": context,
        "name": str(facts.get("name") or "data"),
        "digest": whole.hexdigest()[:12],
        "source_type": "local" if files else "code",
        "source": json.dumps(source, default=str)[:_LONGEST],
        "profile": json.dumps(profile),
    }


def _files(value: Any, folder: Path, key: str = "") -> Iterator[Path]:
    """The files that a nest of arguments names: by a path, a pattern, or a folder of theirs."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _files(item, folder, str(name))
    elif isinstance(value, list):
        for item in value:
            yield from _files(item, folder, key)
    elif isinstance(value, str) and value and (_IS_PATH_KEY.search(key) or "/" in value or Path(value).suffix):
        try:
            path = folder / Path(value).expanduser()
            found = folder.glob(value) if "*" in value and not Path(value).is_absolute() else [path]
            for each in found:
                yield from (
                    (item for item in each.rglob("*") if item.is_file()) if each.is_dir() else [each] * each.is_file()
                )
        except (OSError, ValueError, NotImplementedError):
            return
