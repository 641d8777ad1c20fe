"""What is left of a training that failed: one card that says where, on which samples, and what helps; no collective."""

import itertools
import os
import re
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from dtrain.distributed.ranks import is_lost_rank
from dtrain.tracking.secrets import redact
from dtrain.tracking.whole_file import write_json

if TYPE_CHECKING:
    from dtrain.trainer import Trainer

FAILURE = "failure.json"
OTHERS_SECONDS = 3.0  # so long rank 0 waits for the word of the rank that failed first
NUMBERS_SECONDS = 2.0  # and for the others' random numbers, where it failed itself
_MOST_SAMPLES = 64
STEP_PHASES = ("forward", "backward", "optimizer step", "logging")  # these can be repeated
# The functions whose presence in a stack says what a rank is doing; the first of these that is there counts.
_PHASES = {
    "test": "test",
    "_validate": "validation",
    "save": "saving",
    "check": "saving",
    "finish": "saving",
    "_log": "logging",
    "backward": "backward",
    "_forward_backward": "forward",
    "_optimizer_step": "optimizer step",
    "waiting": "waiting for data",
    "_prepare_metrics": "making the metrics",
}
# The room in which an error passes on its way from a part of the config.
_PARTS = {"dataloader": "loaders", "loss": "loss", "metrics": "metrics", "optimizer": "optimizer", "batch": "model"}
_CURES = (
    (r"out of memory|OutOfMemory", "lower loaders.batch_size and raise trainer.accumulate; trainer.precision=bf16"),
    (
        r"can't allocate memory|Cannot allocate memory|MemoryError|bad_alloc",
        "out of host memory: lower loaders.num_workers, loaders.prefetch_factor or loaders.batch_size",
    ),
    (
        r"killed by signal: Killed|killed by signal: Terminated|(?s:multiprocessing.*(ConnectionResetError|EOFError))",
        "a loader worker was killed, most often for lack of memory: lower loaders.num_workers or prefetch_factor",
    ),
    (
        r"shared memory|Bus error|/dev/shm",
        "too little shared memory for loader workers: docker run --shm-size=8g, or loaders.num_workers=0",
    ),
    (
        r"DataLoader worker .* exited|killed by signal",  # torch does not always see the signal
        "a loader worker died: lower loaders.num_workers if memory was short; loaders.num_workers=0 shows other causes",
    ),
    (r"Expected to have finished reduction", "trainer.ddp.find_unused_parameters=true, or use these parameters"),
    (
        r"NonFiniteError|not finite",
        "dtrain replay RUN_FOLDER repeats the step; a lower optimizer.lr, trainer.clip_grad_norm=1, "
        "trainer.on_nonfinite=skip",
    ),
    (r"Expected more than 1 value per channel", "BatchNorm needs 2 samples per rank: loaders.train.drop_last=true"),
    (
        r"device-side assert|out of bounds|Target \d+ is out",
        "a label is outside the model's classes: compare the labels with the number of outputs",
    ),
    (r"No space left", "the disk is full: free some space and start again"),
    (r"Timed out|[Tt]imeout", "another rank did not come: look at its log; trainer.ddp.timeout_seconds"),
)


def report(trainer: "Trainer", error: BaseException) -> list[str]:
    """Tell the other ranks how this one failed; on rank 0 write failure.json for the first that did.

    Returns:
        The lines of the card, on rank 0; else none. Nothing is raised: the error itself must be seen.
    """
    try:
        lost = trainer.ranks.world_size > 1 and is_lost_rank(error)
        note = _note(trainer, error, consequence=lost)
        trainer.ranks.board.post("failure", note)
        if lost and trainer.ranks.is_main:
            trainer.ranks.board.notes("failure", OTHERS_SECONDS)
        if note["phase"] in STEP_PHASES:  # those who are not gone have had the time to leave their numbers
            trainer.saver.keep_failed_step(trainer, note["phase"] != "logging", 0.5 if lost else NUMBERS_SECONDS)
        if not trainer.ranks.is_main:
            return []
        notes = trainer.ranks.board.notes("failure")
        first = first_of(notes.values())
        if first["consequence"]:
            silent = [rank for rank in range(trainer.ranks.world_size) if rank not in notes]
            first |= {"silent_ranks": silent, "cure": _cure_of_silence(silent)}
        write_json(trainer.parts.start.folder / FAILURE, first, durable=True)
        return card(first, trainer.parts.start.folder)
    except Exception as other:
        return [f"the failure could not be recorded: {other!r}"]


def first_of(notes: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The note of the rank at which it began: rather one with a bad loss than others, no one that saw another go."""
    return dict(min(notes, key=lambda note: (note["consequence"], not note["bad_loss"], note["time"])))


def card(note: Mapping[str, Any], folder: Path) -> list[str]:
    """A failure in a few lines."""
    what = f"{note['error']}: {note['message'].splitlines()[0][:200]}" if note["message"] else note["error"]
    lines = [f"rank {note['rank']} failed at step {note['step'] + 1} ({note['phase']}): {what}"]
    if note.get("silent_ranks"):
        lines.append(f"  without a word: rank {', '.join(map(str, note['silent_ranks']))}")
    if note["where"]:
        lines.append(f"  at {note['where']}")
    if note["config"]:
        lines.append(f"  built from {note['config']}")
    if note["samples"]:
        more = ", ..." if len(note["samples"]) > 8 else ""
        lines.append(f"  samples {', '.join(map(str, note['samples'][:8]))}{more}")
    lines.append(f"  memory {note['memory']}")
    if note["cure"]:
        lines.append(f"  what helps: {note['cure'].replace('RUN_FOLDER', str(folder))}")
    return [*lines, f"  all of it: {folder / FAILURE}"]


def phase_of(names: Sequence[str]) -> str:
    """What a rank is doing, from the names of the functions that it is in, the outermost first."""
    found = [phase for name, phase in _PHASES.items() if name in names]
    return found[0] if found else "start-up"


def memory_text() -> str:
    """This process's memory, and its GPU's."""
    text = f"{psutil.Process().memory_info().rss / 1e9:.2f} GB of {psutil.virtual_memory().total / 1e9:.0f} GB"
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        text += f"; GPU at most {torch.cuda.max_memory_allocated() / 1e9:.2f} of {total / 1e9:.0f} GB"
    return text


def unused_parameters(module: torch.nn.Module, message: str) -> list[str]:
    """The names of the parameters that DistributedDataParallel knows by number: those that had no gradient."""
    found = re.search(r"did not receive grad for rank \d+: ([\d\s,]+)", message)
    names = [name for name, item in module.named_parameters() if item.requires_grad]
    return [names[int(index)] for index in re.findall(r"\d+", found[1])] if found else []


def _note(trainer: "Trainer", error: BaseException, consequence: bool) -> dict[str, Any]:
    frames = traceback.extract_tb(error.__traceback__)
    message = redact("\n".join([str(error), *getattr(error, "__notes__", [])]).strip())
    if names := unused_parameters(trainer.module, message):
        message = f"these parameters had no part in the loss: {', '.join(names)}\n{message}"
    text = redact("".join(traceback.format_exception(error)))
    phase = phase_of([frame.name for frame in frames])
    rooms = [Path(frame.filename).stem for frame in frames if Path(frame.filename).parent == Path(__file__).parent]
    # A number that is not finite shows in the optimizer's step, which is seldom its cause.
    rooms = [] if isinstance(error, ArithmeticError) else rooms
    part = next((_PARTS[room] for room in reversed(rooms) if room in _PARTS), "")
    own = [frame for frame in frames if Path(frame.filename).parent != Path(__file__).parent]
    own = [frame for frame in own if "site-packages" not in frame.filename] or own
    return {
        "rank": trainer.ranks.rank,
        "host": trainer.ranks.host,
        "pid": os.getpid(),
        "time": time.time(),
        "step": trainer.step,
        "epoch": trainer.epoch,
        "phase": phase,
        "error": type(error).__name__,
        "message": message,
        "where": f"{own[-1].filename}:{own[-1].lineno} in {own[-1].name}" if own else "",
        "config": ", ".join(f"{key} ({place})" for key, place in trainer.parts.places.items() if key == part),
        "samples": _samples(trainer, phase, error)[:_MOST_SAMPLES],
        "memory": memory_text(),
        "cure": next((cure for pattern, cure in _CURES if re.search(pattern, text)), ""),
        "traceback": text,
        "consequence": consequence,
        "bad_loss": not bool(torch.isfinite(trainer.sums["loss"])),
    }


def _samples(trainer: "Trainer", phase: str, error: BaseException) -> list[int]:
    """Those of the batch at work; of an evaluation's, where it was the model, the loss or a metric that failed."""
    if phase not in ("validation", "test"):
        return trainer.samples_at_work()
    loader, number = (
        trainer.loaders.test if phase == "test" else trainer.loaders.val,
        getattr(error, "batch_number", None),
    )
    if loader is None or number is None:
        return []
    _epoch, *samples = next(itertools.islice(iter(loader.batch_sampler or ()), number, None), [0])
    return samples


def _cure_of_silence(ranks: list[int]) -> str:
    if not ranks:
        return ""
    return "a process that is killed says nothing: most often the machine's memory was full (dmesg), or a node is gone"


def forget(folder: Path) -> None:
    """A new start begins without the old failure."""
    with suppress(FileNotFoundError):
        (folder / FAILURE).unlink()
