"""The watchdog: names a rank that makes no progress, leaves every rank's stacks, ends the job."""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from dtrain.data.loader_workers import stacks_of_workers
from dtrain.distributed import by_node
from dtrain.distributed.exit_status import FAILED
from dtrain.tracking.run_folder import RunFolder, update_run
from dtrain.tracking.whole_file import write_json, write_text
from dtrain.training.bad_node import note_nodes_of
from dtrain.training.evidence import Evidence
from dtrain.training.failure_card import memory_text
from dtrain.training.setup import Parts

ANSWER_SECONDS = 3.0  # so long the others have to tell where they are
_END_SECONDS = 60.0  # so long the end itself may take
_FROZEN_SECONDS = 10.0  # beyond the limit: then even this watch's own thread does not run


@contextlib.contextmanager
def watchdog(evidence: Evidence, limit_seconds: float | None) -> Iterator[None]:
    """End this process, and what hangs with it, when `activity.beats` does not change for so long; None or 0: never."""
    if not limit_seconds:
        yield
        return
    ranks = evidence.parts.ranks
    ranks.mailbox.post("process", (ranks.host, os.getpid()))
    over = threading.Event()
    thread = threading.Thread(target=_watch, args=(evidence, limit_seconds, over), name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        faulthandler.cancel_dump_traceback_later()


def _watch(evidence: Evidence, limit_seconds: float, over: threading.Event) -> None:
    """What the watchdog's thread does."""
    activity, mailbox = evidence.activity, evidence.parts.ranks.mailbox
    beats, since = activity.beats, time.monotonic()
    while not over.wait(min(1.0, limit_seconds / 10)):
        # Should code that never lets go of the interpreter stop this thread as well, C code ends the process.
        faulthandler.dump_traceback_later(limit_seconds + _FROZEN_SECONDS, exit=True, file=2)
        if activity.beats != beats:
            beats, since = activity.beats, time.monotonic()
        elif time.monotonic() - since >= limit_seconds or mailbox.is_raised("hang"):
            _end(evidence, limit_seconds)


def _end(evidence: Evidence, limit_seconds: float) -> None:
    """Say where this rank is; rank 0 says it for all, or the lowest that answers, and ends those that are frozen."""
    ranks, mailbox = evidence.parts.ranks, evidence.parts.ranks.mailbox
    faulthandler.dump_traceback_later(_END_SECONDS, exit=True, file=2)
    mailbox.raise_flag("hang")
    mailbox.post("hang", _whereabouts(evidence))
    speaker = mailbox.lowest("hang", ANSWER_SECONDS)
    if ranks.rank == speaker:
        _speak(evidence, limit_seconds)
    else:
        if ranks.rank in mailbox.notes("stuck", 2 * ANSWER_SECONDS, [speaker]).get(speaker, ()):
            with contextlib.suppress(Exception):  # helpful, not needed
                mailbox.post("workers", stacks_of_workers())
        time.sleep(2 * ANSWER_SECONDS)  # who speaks is to have spoken before a launcher ends it for this one's sake
    os._exit(FAILED)


def _speak(evidence: Evidence, limit_seconds: float) -> None:
    """Say for all ranks where they are, and end those of this machine that do not answer."""
    ranks, mailbox = evidence.parts.ranks, evidence.parts.ranks.mailbox
    notes = mailbox.notes("hang", ANSWER_SECONDS)
    silent = [rank for rank in range(ranks.world_size) if rank not in notes]
    stuck = silent or stuck_of(notes)
    mailbox.post("stuck", stuck)
    if not silent:
        with contextlib.suppress(Exception):
            if ranks.rank in stuck:
                mailbox.post("workers", stacks_of_workers())
            for rank, stacks in mailbox.notes("workers", ANSWER_SECONDS, stuck).items():
                notes[rank]["stacks"] |= stacks
    reason = f"no progress for {limit_seconds:g} s; rank {', '.join(map(str, stuck))} is stuck"
    _report(evidence.parts, reason, notes, stuck[0])
    note_nodes_of(ranks, evidence.parts.start.folder, stuck, f"hung: {reason}")
    _kill(mailbox.notes("process", ranks=silent), silent, ranks.host)


def _report(parts: Parts, reason: str, notes: dict[int, dict[str, Any]], stuck: int) -> None:
    """Say where all ranks are, and leave it in the run folder, where there is one on this machine."""
    say = parts.progress.note if parts.ranks.is_main else lambda line: sys.stderr.write(f"{line}\n")
    lines = [_line(rank, notes.get(rank)) for rank in range(parts.ranks.world_size)]
    for line in (reason, *(f"  {line}" for line in lines)):
        say(line)
    files = RunFolder(parts.start.folder)
    stacks = [f"rank {rank}, {name}\n{stack}" for rank, note in notes.items() for name, stack in note["stacks"].items()]
    with contextlib.suppress(OSError):
        write_text(files.hang, "\n\n".join([reason, "\n".join(lines), *stacks]) + "\n")
        note = {key: value for key, value in notes.get(stuck, {}).items() if key not in ("stacks", "collectives")}
        cure = f"the stacks of all ranks are in {files.hang}; trainer.hang_timeout_seconds is the limit"
        failed = {"rank": stuck, "error": "Hang", "message": reason, "cure": cure, "time": time.time()}
        write_json(files.failure, {**note, **failed}, durable=True)
        update_run(parts.start.folder, state="FAILED", reason=reason, exit_status=FAILED, ended=round(time.time(), 3))
        say(cure)


def _whereabouts(evidence: Evidence) -> dict[str, Any]:
    """This rank's step, phase and stacks."""
    threads = {thread.ident: thread.name for thread in threading.enumerate()}
    stacks = {
        f"thread {threads.get(number, number)}": "".join(traceback.format_stack(frame))
        for number, frame in sys._current_frames().items()
        if number != threading.get_ident()
    }
    state, phase = evidence.state, evidence.activity.phase
    return {
        "collectives": _collectives_begun(), "step": state.step, "epoch": state.epoch, "phase": phase,
        "stacks": stacks, "samples": evidence.samples(), "host": evidence.parts.ranks.host, "pid": os.getpid(),
        "memory": memory_text(),
    }  # fmt: skip


def _collectives_begun() -> int:
    """How many collectives this rank has begun, those of DistributedDataParallel and FSDP, and by node, included."""
    with contextlib.suppress(Exception):
        if dist.is_initialized():
            of_torch = dist.distributed_c10d._get_default_group()._get_sequence_number_for_group()  # type: ignore[attr-defined]
            return of_torch + by_node.begun()
    return 0


def stuck_of(notes: dict[int, dict[str, Any]]) -> list[int]:
    """The ranks that the others wait for: those that are furthest behind, in steps and then within one.

    In the same phase, those that the others wait for have begun fewer collectives.
    """
    # The number of a step counts those that are done: what follows it comes before the next one's forward.
    order = ["waiting for data", "waiting for ranks", "forward", "backward", "optimizer step"]

    def progress(note: dict[str, Any]) -> tuple[int, int, int]:
        phase = order.index(note["phase"]) if note["phase"] in order else -1
        return note["step"], phase, note["collectives"]

    least = min(map(progress, notes.values()))
    return [rank for rank, note in notes.items() if progress(note) == least]


def _line(rank: int, note: dict[str, Any] | None) -> str:
    if note is None:
        return f"rank {rank}: does not answer: stopped, frozen or gone"
    return f"rank {rank}: step {note['step'] + 1}, {note['phase']} (process {note['pid']} on {note['host']})"


def _kill(processes: dict[int, tuple[str, int]], silent: list[int], host: str) -> None:
    """A process that is stopped obeys no other signal, and its launcher would wait for it."""
    for rank, (its_host, pid) in processes.items():
        if rank in silent and its_host == host:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
