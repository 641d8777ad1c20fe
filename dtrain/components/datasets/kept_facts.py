"""What was found out about a dataset's files, kept beside them, so that of many ranks and starts one reads them."""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dtrain.components.datasets.files import version_of
from dtrain.components.datasets.folder_lock import one_at_a_time
from dtrain.components.datasets.slices import settings_of

VERSION = 1  # of what is kept
WORTH_SECONDS = 1.0  # of reading, from which on it is kept

Facts = dict[str, Any]  # of one file: plain values by what they are of


@contextlib.contextmanager
def kept_facts(
    files: Sequence[Path], about: Sequence[Any], labels: Sequence[Path | None] = ()
) -> Iterator[list[Facts]]:
    """Facts about each of the files, to look up and to add to; what was added is kept where that is worth it.

    They lie in a hidden file in the folder of the first of them, or where nothing can be written there, in
    ~/.cache/dtrain. A file that changed (see `version_of`) has none. While one process finds out what is missing, the
    others wait; without locks in a file system, each does it itself.

    Args:
        files: Absolute; a file that is not there has no facts.
        about: Everything that the facts depend on, besides the files' contents: plain values.
        labels: What else each of the facts depends on: a second file for each of the files, if any.
    """
    folder = files[0].parent
    name = f".{hashlib.sha256(json.dumps([VERSION, *about]).encode()).hexdigest()[:12]}.facts.json"
    beside = f"{folder}{os.sep}"
    names = [path.removeprefix(beside) for path in map(str, files)]
    versions: list[list[Any]] = [version_of(file) for file in files]
    if any(labels):
        others = [[str(file), *version_of(file)] if file else [] for file in labels]
        versions = [own and own + other for own, other in zip(versions, others, strict=True)]
    homes = [folder / name, _cache() / hashlib.sha256(str(folder).encode()).hexdigest()[:12] / name]
    facts = _known(homes, names, versions)
    if all(facts):
        yield facts
        return
    with one_at_a_time(folder):
        facts = _known(homes, names, versions)  # another process may have found them meanwhile
        before, began = json.dumps(facts), time.monotonic()
        yield facts
        if time.monotonic() - began >= WORTH_SECONDS and json.dumps(facts) != before:
            _keep(homes, dict(zip(names, zip(versions, facts, strict=True), strict=True)))


@contextlib.contextmanager
def facts_of(
    volumes: Sequence[Any], pairs: Sequence[tuple[Path, Path | None]], about: Sequence[Any], builder: Any, reads: bool
) -> Iterator[None]:
    """Volumes with what is kept of them, meanwhile, where that spares reading them: statistics, and chosen patches.

    Args:
        volumes: Each is given its `facts`.
        pairs: The image and the label of each.
        about: See `kept_facts`; the builder's settings are added.
        builder: The slice_builder.
        reads: Whether each volume is read whole for its statistics.
    """
    settings = settings_of(builder)
    if not reads and not settings:
        yield
        return
    images, labels = zip(*pairs, strict=True)
    with kept_facts(images, [*about, settings], labels) as facts:
        for volume, known in zip(volumes, facts, strict=True):
            volume.facts = known
        yield
    for volume in volumes:
        volume.facts = {}


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dtrain" / "facts"


def _known(homes: Sequence[Path], names: Sequence[str], versions: Sequence[list[Any]]) -> list[Facts]:
    """What is kept of these very versions."""
    found: dict[str, Any] = {}
    for home in homes:
        found |= _read(home)
    rows = [(found.get(name), version) for name, version in zip(names, versions, strict=True)]
    return [row[1] if row and version and row[0] == version else {} for row, version in rows]


def _read(home: Path) -> dict[str, Any]:
    try:
        kept: dict[str, Any] = json.loads(home.read_bytes())
    except (OSError, ValueError):  # there is none, or it is damaged
        return {}
    return kept if isinstance(kept, dict) else {}


def _keep(homes: Sequence[Path], rows: dict[str, Any]) -> None:
    """Whole or not at all, beside what is kept of other files, in the first folder that can be written."""
    for home in homes:
        temporary = home.with_name(f"{home.name}.{os.getpid()}")
        try:
            home.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(_read(home) | rows))
            temporary.replace(home)
            return
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
