"""A watch on a rank that makes no progress: names it, leaves every rank's stacks, ends the job; knows no step."""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrain.data.loader_workers import stacks_of_workers
from dtrain.tracking.run_folder import update_run
from dtrain.tracking.whole_file import write_json, write_text
from dtrain.training.failure import FAILURE, memory_text, phase_of

if TYPE_CHECKING:
    from dtrain.trainer import Trainer

HANG = "hang.txt"
ANSWER_SECONDS = 3.0  # so long the others have to tell where they are
# Functions of torch in whose stack a rank waits for the others.
_COLLECTIVES = {"_sync_buffers", "all_reduce", "broadcast", "broadcast_object_list", "gather_object", "settle", "_read"}
_END_SECONDS = 60.0  # so long the end itself may take
_FROZEN_SECONDS = 10.0  # beyond the limit: then even this watch's own thread does not run


@contextlib.contextmanager
def watched(trainer: "Trainer", limit_seconds: float | None) -> Iterator[None]:
    """End this process, and what hangs with it, when `trainer.beats` does not change for so long."""
    if not limit_seconds:
        yield
        return
    trainer.ranks.board.post("process", (trainer.ranks.host, os.getpid()))
    over = threading.Event()
    main = threading.get_ident()
    watch = threading.Thread(target=_watch, args=(trainer, limit_seconds, main, over), name="watch", daemon=True)
    watch.start()
    try:
        yield
    finally:
        over.set()
        watch.join()
        faulthandler.cancel_dump_traceback_later()


def _watch(trainer: "Trainer", limit_seconds: float, main: int, over: threading.Event) -> None:
    beats, since = trainer.beats, time.monotonic()
    while not over.wait(min(1.0, limit_seconds / 10)):
        # Should code that never lets go of the interpreter stop this thread as well, C code ends the process.
        faulthandler.dump_traceback_later(limit_seconds + _FROZEN_SECONDS, exit=True, file=2)
        if trainer.beats != beats:
            beats, since = trainer.beats, time.monotonic()
        elif time.monotonic() - since >= limit_seconds or trainer.ranks.board.is_raised("hang"):
            _end(trainer, limit_seconds, main)


def _end(trainer: "Trainer", limit_seconds: float, main: int) -> None:
    """Say where this rank is; rank 0 says it for all, and ends those that are frozen on its machine."""
    ranks = trainer.ranks
    faulthandler.dump_traceback_later(_END_SECONDS, exit=True, file=2)
    ranks.board.raise_flag("hang")
    ranks.board.post("hang", _where(trainer, main))
    notes = ranks.board.notes("hang", ANSWER_SECONDS)
    silent = [rank for rank in range(ranks.world_size) if rank not in notes]
    stuck = silent or stuck_of(notes)
    if not silent:
        with contextlib.suppress(Exception):  # helpful, not needed
            ranks.board.post("workers", stacks_of_workers() if ranks.rank in stuck else {})
            for rank, stacks in ranks.board.notes("workers", ANSWER_SECONDS).items():
                notes[rank]["stacks"] |= stacks
    text = "\n".join(_line(rank, notes.get(rank)) for rank in range(ranks.world_size))
    if ranks.is_main or (0 in silent and ranks.rank == min(notes)):
        say = sys.stderr.write if not ranks.is_main else lambda line: trainer.progress.note(line.strip())
        reason = f"no progress for {limit_seconds:g} s; rank {', '.join(map(str, stuck))} is stuck"
        say(f"{reason}\n")
        for line in text.splitlines():
            say(f"  {line}\n")
        say(_write(trainer, reason, text, notes, stuck[0]))
        _kill(ranks.board.notes("process"), silent, ranks.host)
    else:
        time.sleep(2 * ANSWER_SECONDS)  # rank 0 is to speak before a launcher ends it for this one's sake
    os._exit(1)


def stuck_of(notes: dict[int, dict[str, Any]]) -> list[int]:
    """The ranks that the others wait for: those that are furthest behind, in steps and then within one."""
    # The number of a step counts those that are done: what follows it comes before the next one's forward.
    order = ["waiting for data", "forward", "backward", "optimizer step"]

    def progress(note: dict[str, Any]) -> tuple[int, int, bool]:
        phase = order.index(note["phase"]) if note["phase"] in order else -1
        return note["step"], phase, note["waits"]

    least = min(map(progress, notes.values()))
    return [rank for rank, note in notes.items() if progress(note) == least]


def _where(trainer: "Trainer", main: int) -> dict[str, Any]:
    """This rank's step, phase and stacks."""
    frames = sys._current_frames()
    stack = traceback.extract_stack(frames[main])
    names = [frame.name for frame in stack]
    threads = {thread.ident: thread.name for thread in threading.enumerate()}
    stacks = {
        f"thread {threads.get(number, number)}": "".join(traceback.format_stack(frame))
        for number, frame in frames.items()
        if number != threading.get_ident()
    }
    return {
        "waits": not _COLLECTIVES.isdisjoint(names) or "/torch/distributed/" in stack[-1].filename,
        "step": trainer.step, "epoch": trainer.epoch, "phase": phase_of(names), "stacks": stacks,
        "samples": trainer.samples_at_work(), "host": trainer.ranks.host, "pid": os.getpid(), "memory": memory_text(),
    }  # fmt: skip


def _line(rank: int, note: dict[str, Any] | None) -> str:
    if note is None:
        return f"rank {rank}: does not answer: stopped, frozen or gone"
    return f"rank {rank}: step {note['step'] + 1}, {note['phase']} (process {note['pid']} on {note['host']})"


def _write(trainer: "Trainer", reason: str, text: str, notes: dict[int, dict[str, Any]], stuck: int) -> str:
    """Leave it in the run folder; returns the line that says so, '' where there is no such folder on this machine."""
    folder: Path = trainer.parts.start.folder
    stacks = [f"rank {rank}, {name}\n{stack}" for rank, note in notes.items() for name, stack in note["stacks"].items()]
    with contextlib.suppress(OSError):
        write_text(folder / HANG, "\n\n".join([reason, text, *stacks]) + "\n")
        note = {key: value for key, value in notes.get(stuck, {}).items() if key != "stacks"}
        cure = f"the stacks of all ranks are in {folder / HANG}; trainer.hang_timeout_seconds is the limit"
        failed = {"rank": stuck, "error": "Hang", "message": reason, "cure": cure, "time": time.time()}
        write_json(folder / FAILURE, {**note, **failed}, durable=True)
        update_run(folder, state="FAILED", reason=reason, exit_status=1, ended=round(time.time(), 3))
        return f"{cure}\n"
    return ""


def _kill(processes: dict[int, tuple[str, int]], silent: list[int], host: str) -> None:
    """A process that is stopped obeys no other signal, and its launcher would wait for it."""
    for rank, (its_host, pid) in processes.items():
        if rank in silent and its_host == host:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
