"""The process that mirrors a run folder elsewhere, and asks and fetches mirrors: `python -m dtrain.tracking.mirror`."""

import argparse
import contextlib
import json
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from filelock import Timeout

from dtrain.tracking.mirror_store import MirrorError, MirrorStore
from dtrain.tracking.mirror_upload import LINKS, MANIFEST, NotOursError, Upload
from dtrain.tracking.outage import Outage
from dtrain.tracking.retry import PATIENCE_SECONDS, Retry
from dtrain.tracking.run_folder import RunFolder, locked_file
from dtrain.tracking.secrets import Redacted, redact
from dtrain.tracking.start_mirror import ADDRESS

_STDIN = 0  # rank 0's pipe
HOPELESS = 2  # the exit status where no other start would help
_ORPHAN_SECONDS = 60.0  # so long it works on without a rank 0; the rest is `dtrain sync`'s, or the next start's
_LOOK_EVERY_SECONDS, _LOOK_EVERY_SECONDS_AT_THE_END = 1.0, 0.1
_LONGEST_PAUSE_SECONDS, _PAUSE_SECONDS_AT_THE_END = 60.0, 1.0  # between tries that fail
_OUTAGE_SECONDS = 5.0  # so long it may be away without a line
_log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0: all is there, or what was asked is printed; 1: not so; 2: nor would it be after another start."""
    parser = argparse.ArgumentParser(prog="python -m dtrain.tracking.mirror", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, metavar="RUN_FOLDER")
    parser.add_argument("--parent", type=int, metavar="PID", help="rank 0, while which lives the folder is mirrored")
    parser.add_argument("--accepts", type=float, metavar="TIME", help="the start that wrote the mirror last")
    parser.add_argument("--look", action="store_true", help="print what the mirror holds, as JSON")
    parser.add_argument("--probe", action="store_true", help="and whether it can be written")
    parser.add_argument("--fetch", action="store_true", help="copy the mirror into RUN_FOLDER")
    options = parser.parse_args(arguments)
    with contextlib.redirect_stderr(Redacted(sys.stderr)), contextlib.redirect_stdout(Redacted(sys.stdout)):
        logging.basicConfig(format="%(asctime)s %(message)s")
        if options.look or options.probe or options.fetch:
            return _answer(options)
        if options.parent is None:
            return _send_rest(options.folder.absolute())
        return _follow(options.folder.absolute(), options.parent, options.accepts)


def _answer(options: argparse.Namespace) -> int:
    """Print what is asked as one JSON object, the error included."""
    store = None
    try:
        store = MirrorStore(os.environ[ADDRESS])
        if options.probe:
            store.probe()
        found = _fetched(store, options.folder) if options.fetch else _look(store)
    except Exception as error:
        known = store.error(error) if store else error
        found = {"error": redact(str(known)), "is_mistake": isinstance(known, MirrorError) and known.is_mistake}
    print(json.dumps(found))
    return 1 if "error" in found else 0


def _look(store: MirrorStore) -> dict[str, Any]:
    """Which run is there, its config, its checkpoints by name, and how large all of it is."""
    sizes = store.sizes()
    names = [name for name in sizes if name.startswith("checkpoints/") and name.endswith(f"/{MANIFEST}")]
    # One of which nothing is there any more was removed meanwhile: the process of the start before may be at work.
    manifests = {name.rpartition("/")[0]: json.loads(text) for name in names if (text := store.read(name))}
    checkpoints = {
        name: {key: facts.get(key) for key in ("step", "serial", "sha256")} for name, facts in manifests.items()
    }
    run, config = json.loads(store.read("run.json") or b"{}"), store.read("config.yaml").decode(errors="replace")
    return {
        "run": run, "config": config, "checkpoints": checkpoints, "bytes": sum(sizes.values()), "files": len(sizes),
    }  # fmt: skip


def _fetched(store: MirrorStore, folder: Path) -> dict[str, Any]:
    """Copy all files into a folder; of checkpoints those whose manifest is there, and only what is not here yet."""
    sizes = store.sizes()
    whole = {name.rpartition("/")[0] for name in sizes if name.endswith(f"/{MANIFEST}")}
    for name, size in sizes.items():
        path, is_of_checkpoint = folder / name, name.startswith("checkpoints/")
        if ".." in Path(name).parts or name == LINKS:
            continue
        if is_of_checkpoint and not any(name.startswith(f"{each}/") for each in whole):
            continue  # of one that was on its way, or going
        if is_of_checkpoint and path.is_file() and path.stat().st_size == size:
            continue  # by an earlier start, which was interrupted
        path.parent.mkdir(parents=True, exist_ok=True)
        partly = path.with_name(f".{path.name}.part")
        with partly.open("wb") as file:
            store.download(name, file)
        partly.replace(path)
    links = json.loads(store.read(LINKS) or b"{}")
    return {"links": links}


def _send_rest(folder: Path) -> int:
    """`dtrain sync`: brings what is left of a run that nobody writes any more."""
    address = os.environ[ADDRESS]
    try:
        with locked_file(RunFolder(folder).mirror_lock, 5):
            store = MirrorStore(address)
            upload = Upload(folder, store)
            problem = _until_done(upload, store, lambda: True)
    except (MirrorError, NotOursError) as error:
        problem = str(error)
    except Timeout:
        problem = f"another process is at work on it, see {RunFolder(folder).mirror_log}"
    if problem:
        print(f"the mirror ({redact(address)}) does not have all of {folder}: {problem}", file=sys.stderr)
        return 1
    print(f"all of {folder} is in {redact(address)}")
    return 0


def _follow(folder: Path, parent: int, accepts: float | None) -> int:
    """The mirror of a training that runs; what it has to tell goes to stdout, at whose other end rank 0 listens."""
    _run_in_background()
    rank_0 = os.dup(1)
    RunFolder(folder).logs.mkdir(exist_ok=True)
    log = os.open(RunFolder(folder).mirror_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for output in (1, 2):
        os.dup2(log, output)
    address = os.environ[ADDRESS]
    kept = "the training continues, and the mirror gets the rest later"
    outage = Outage(address, rank_0, service="the mirror", kept=kept, seconds=_OUTAGE_SECONDS)
    outage.is_over()  # it has answered at the start, and its first answer here may be after gigabytes

    rank_0_is = _Rank0(parent)
    try:
        # That of a rank 0 that was killed may still bring the rest.
        with locked_file(RunFolder(folder).mirror_lock, 2 * _ORPHAN_SECONDS):
            store = MirrorStore(address)
            upload = Upload(folder, store, accepts, outage.tell)
            return 1 if _until_done(upload, store, rank_0_is.done, outage) else 0
    except (MirrorError, NotOursError) as error:
        _log.warning("%s", error)
        outage.tell(f"the mirror ({redact(address)}) gets nothing more: {error}")
        return HOPELESS
    except Timeout:
        return 1


class _Rank0:
    """Whether the process that writes the run folder has said that it is done, or has gone."""

    def __init__(self, pid: int) -> None:
        self._pid, self._is_done = pid, False

    def done(self) -> bool:
        """From then on, nothing more is written; after one that has gone, this process does not live on for long."""
        if not self._is_done and os.getppid() != self._pid:
            self._is_done = True
            timer = threading.Timer(_ORPHAN_SECONDS, os._exit, [1])  # safe: what is not whole there is not there
            timer.daemon = True
            timer.start()
        if not self._is_done and select.select([_STDIN], [], [], 0)[0]:
            self._is_done = True  # a word, or the pipe's end
        return self._is_done


def _until_done(upload: Upload, store: MirrorStore, is_over: Callable[[], bool], outage: Outage | None = None) -> str:
    """Bring everything until the run is over and all of it is there ('') or that cannot be had: why not."""
    retry, problem, over_since = Retry(1.0, _LONGEST_PAUSE_SECONDS), "", 0.0
    while True:
        ends = is_over()  # first of all: what is written until then is sent
        over_since = over_since or (time.monotonic() if ends else 0.0)
        if retry.is_due(_PAUSE_SECONDS_AT_THE_END if ends else None):
            try:
                with retry.attempt():
                    is_done = upload.step(is_last=ends)
                problem = ""
                if outage:
                    outage.is_over()
                if is_done and ends:
                    upload.remember()
                    return ""
            except NotOursError:
                raise
            except Exception as error:
                problem = _noted(error, store, problem)
                upload.remember(problem)
                if outage:
                    outage.fails(problem)
        if problem and ends and time.monotonic() > max(over_since, upload.progressed_at) + PATIENCE_SECONDS:
            return problem
        time.sleep(_LOOK_EVERY_SECONDS_AT_THE_END if ends else _LOOK_EVERY_SECONDS)


def _noted(error: Exception, store: MirrorStore, before: str) -> str:
    """What an error means; in the log once."""
    problem = str(store.error(error))
    if problem != before:
        _log.warning("%s", problem, exc_info=not isinstance(error, OSError))
    return problem


def _run_in_background() -> None:
    """Leave the processor to the ranks, and stay alive where a batch system signals every process of a job to end."""
    os.nice(max(0, 19 - os.nice(0)))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    exit_status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_status)  # fsspec's threads would be waited for
