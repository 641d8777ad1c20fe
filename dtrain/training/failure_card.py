"""The failure card: where a training failed, on which samples, and what helps.

Nothing here is a collective: the other ranks may be gone.
"""

import math
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from dtrain.distributed.launched_rank import leaves_to_launcher
from dtrain.distributed.ranks import is_lost_rank
from dtrain.distributed.stop_request import Interrupted
from dtrain.reporting.own_frames import (
    MOST_CHARACTERS,
    Frame,
    frame_lines,
    in_one_line,
    message_of,
    only_own,
    place_of_error,
    whole_traceback,
)
from dtrain.tracking.run_folder import RunFolder
from dtrain.tracking.secrets import redact
from dtrain.tracking.whole_file import read_json, write_json
from dtrain.training.evidence import Evidence

OTHERS_SECONDS = 3.0  # so long rank 0 waits for the word of the rank that failed first
NUMBERS_SECONDS = 2.0  # and for the others' random numbers, where it failed itself
_MOST_SAMPLES = 64
_MOST_LINES = 4  # of an error's message, after the first
STEP_PHASES = ("forward", "backward", "optimizer step", "logging")  # these can be repeated
_CURES = {  # by what the error says; the first that applies
    r"out of memory|OutOfMemory": "lower loaders.batch_size and raise trainer.accumulate; trainer.precision=bf16",
    r"can't allocate memory|Cannot allocate memory|MemoryError|bad_alloc": (
        "out of host memory: lower loaders.num_workers, loaders.prefetch_factor or loaders.batch_size"
    ),
    r"killed by signal: Killed|killed by signal: Terminated|(?s:multiprocessing.*(ConnectionResetError|EOFError))": (
        "a loader worker was killed, most often for lack of memory: lower loaders.num_workers or prefetch_factor"
    ),
    r"shared memory|Bus error|/dev/shm": (
        "too little shared memory for loader workers: docker run --shm-size=8g, or loaders.num_workers=0"
    ),
    r"DataLoader worker .* exited|killed by signal": (  # torch does not always see the signal
        "a loader worker died: lower loaders.num_workers if memory was short; loaders.num_workers=0 shows other causes"
    ),
    r"Expected to have finished reduction": (
        "trainer.ddp.find_unused_parameters=true, or use these parameters; freeze others before the training begins"
    ),
    r"ready only once": (
        "checkpoint(..., use_reentrant=False) where the model recomputes activations; for parameters that one forward "
        "uses several times trainer.ddp.static_graph=true (with trainer.accumulate=1)"
    ),
    r"returned nan values in its": (
        "this operation has no finite gradient for what it got (sqrt or norm of 0, log of 0, 0/0): keep it away from "
        "there, as by adding an epsilon; where the loss was NaN before, dtrain replay RUN_FOLDER finds its beginning"
    ),
    r"NonFiniteError|not finite": (
        "dtrain replay RUN_FOLDER repeats the step; a lower optimizer.lr, trainer.clip_grad_norm=1, "
        "trainer.on_nonfinite=skip"
    ),
    r"Expected more than 1 value per channel": "BatchNorm needs 2 samples per rank: loaders.train.drop_last=true",
    r"device-side assert|out of bounds|Target \d+ is out": (
        "a label is outside the model's classes: compare the labels with the number of outputs"
    ),
    r"ranks' weights are not the same": (
        "some gradients were not averaged: trainer.ddp.static_graph=true where one forward uses parameters several "
        "times, checkpoint(..., use_reentrant=False); and nothing may change weights on one rank alone"
    ),
    r"target dtype to be Long|expected scalar type Long|expected Long but got": (
        "this loss takes class labels as integers: have the dataset return label.long() (int64)"
    ),
    r"cast to the desired output type (Long|Int|Short|Char|Byte|Bool)|Found dtype \w+ but expected (Float|Double)|"
    r"Expected floating point type for target": (
        "this loss takes targets as floating point numbers of the output's shape: have the dataset return "
        "target.float(); for integer labels of classes take CrossEntropyLoss"
    ),
    r"must have the same dtype, but got|Input type \(.*\) and (bias|weight) type|expected scalar type": (
        "the model's weights are float32, its inputs are not: have the dataset return x.float() (NumPy's default is "
        "float64, pictures are bytes)"
    ),
    r"must be the same as input size|different to the input size|multi-target not supported|match target batch_size": (
        "output and target differ in shape: target.unsqueeze(1) adds the channel that an output of (N, 1) has, "
        "target.squeeze(1) removes it for class labels; else compare the model's number of outputs with the data"
    ),
    r"stack expects each tensor to be equal size": (
        "samples differ in size: crop, pad or resize them in the transforms, or name a loaders.collate_fn"
    ),
    r"shapes cannot be multiplied|expected input\[.*channels|The size of tensor a|Sizes of tensors must match|"
    r"should contain \d+ elements not|expected input with shape|Expected \d+D|greater than actual input size|"
    r"Output size is too small|is invalid for input of size|size mismatch": (
        "two shapes do not fit: compare the shape of a sample with the model's arguments (channels, features, image "
        "size, which most networks want as a multiple of what they divide it by)"
    ),
    r"all elements of input should be between 0 and 1": (
        "BCELoss takes probabilities: for a model without a sigmoid at its end take BCEWithLogitsLoss"
    ),
    r"does not require grad and does not have a grad_fn": (
        "the loss depends on no parameter that is trained: nothing on the way from them may detach (argmax, .item(), "
        "no_grad), and not all may be frozen"
    ),
    r"backward through the graph a second time": "what the model keeps from step to step needs detach()",
    r"modified by an inplace operation": (
        "replace the operation in place (x += y, relu_(), inplace=True) by one that makes a new tensor; where a model "
        "with running statistics is called twice in a step, trainer.ddp.broadcast_buffers=false"
    ),
    r"on the same device|not on the expected device": (
        "what is made in forward goes to the input's device (device=x.device); constants belong into register_buffer"
    ),
    r"No space left": "the disk is full: free some space and start again",
    r"Timed out|[Tt]imeout": "another rank did not come: look at its log; trainer.ddp.timeout_seconds",
}
_CURE_OF_SILENCE = (
    "a process that is killed says nothing: most often the machine's memory was full (dmesg), or a node is gone"
)


@contextmanager
def reported(evidence: Evidence) -> Iterator[None]:
    """Give an error that comes from inside a card, as a note, which is shown last; a second Ctrl-C has none."""
    try:
        yield
    except BaseException as error:
        lines = [] if isinstance(error, Interrupted) else report(evidence, error)
        error.failure_card = lines  # type: ignore[attr-defined]
        if lines:
            error.add_note("\n".join(lines))
        raise


def report(evidence: Evidence, error: BaseException) -> list[str]:
    """Tell the other ranks how this one failed; on rank 0 write failure.json for the first that did.

    Returns the card's lines on rank 0, none elsewhere. Nothing is raised: the error itself must be seen.
    """
    ranks, mailbox, folder = evidence.parts.ranks, evidence.parts.ranks.mailbox, evidence.parts.start.folder
    problem = ""
    try:
        lost = ranks.world_size > 1 and is_lost_rank(error)
        evidence.locate(error)
        note = _note(evidence, error, consequence=lost)
        mailbox.post("failure", note)
        if lost and ranks.is_main:
            others = mailbox.notes("failure", OTHERS_SECONDS)
            if leaves_to_launcher() and all(each["consequence"] for each in others.values()):
                _leave_reason(folder, ranks.world_size, others)
                return []
        if note["phase"] in STEP_PHASES:  # those who are not gone have had the time to leave their numbers
            timeout_seconds = 0.5 if lost else NUMBERS_SECONDS
            problem = evidence.keep_step(note["phase"] != "logging", timeout_seconds)
        if not ranks.is_main:
            return []
        notes = mailbox.notes("failure")
        first = first_of(notes.values())
        alike = [rank for rank, each in sorted(notes.items()) if _is_alike(each, first)]
        first |= {"ranks_alike": alike} if len(alike) > 1 else {}
        if first["consequence"]:
            silent = [rank for rank in range(ranks.world_size) if rank not in notes]
            first |= {"silent_ranks": silent, "cure": _CURE_OF_SILENCE if silent else ""}
        write_json(RunFolder(folder).failure, first, durable=True)
        return [*filter(None, [problem]), *card(first, folder)]
    except Exception as other:
        return [f"the failure could not be recorded: {other!r}"]


def _leave_reason(folder: Path, world_size: int, notes: Mapping[int, Any]) -> None:
    """Ranks are gone, and the launcher starts again without them: nobody needs to look into that."""
    silent = [rank for rank in range(world_size) if rank not in notes]
    first = {**first_of(notes.values()), "silent_ranks": silent, "cure": ""}
    write_json(RunFolder(folder).failure, first, durable=True)


def first_of(notes: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The note of the rank at which it began: rather one with a bad loss than others, no one that saw another go."""
    return dict(min(notes, key=lambda note: (note["consequence"], not note["bad_loss"], note["time"])))


def _is_alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two ranks failed in the same way at the same place."""
    return all(one[key] == other[key] for key in ("error", "where", "step", "phase", "consequence"))


def first_failure(folder: Path, rank: int) -> str:
    """What failure.json says of a failure that began on another rank than this one, in a line; '' of its own."""
    note = read_json(RunFolder(folder).failure)
    if silent := note.get("silent_ranks"):
        return f"rank {', '.join(map(str, silent))} exited without reporting an error"
    is_of_another = bool(note) and note["rank"] != rank
    return f"rank {note['rank']}: {in_one_line(note['error'], note['message'])}" if is_of_another else ""


def card(note: Mapping[str, Any], folder: Path) -> list[str]:
    """A failure in a few lines, after those of the user's own files that led to it."""
    what, rest = in_one_line(note["error"], note["message"]), note["message"].splitlines()[1:]
    rest = [line for line in rest if line.strip() and not line.startswith("while loading ")]
    ranks = f"rank {note['rank']}"
    if also := [str(rank) for rank in note.get("ranks_alike", ()) if rank != note["rank"]]:
        ranks += f" (and {', '.join(also[:8])}{', ...' if len(also) > 8 else ''} alike)"
    lines = [f"{ranks} failed at step {note['step'] + 1} ({note['phase']}): {what}"]
    lines += [f"  {line[:MOST_CHARACTERS]}" for line in rest[:_MOST_LINES]]
    if note.get("silent_ranks"):
        lines.append(f"  exited without reporting an error: rank {', '.join(map(str, note['silent_ranks']))}")
    if note["where"]:
        lines.append(f"  at {note['where']}")
    if note.get("forward"):
        lines.append(f"  backward of {note['forward']}")
    if note["config"]:
        lines.append(f"  built from {note['config']}")
    if note["samples"]:
        more = ", ..." if len(note["samples"]) > 8 else ""
        lines.append(f"  samples {', '.join(map(str, note['samples'][:8]))}{more}")
    lines.append(f"  memory {note['memory']}")
    if note["cure"]:
        lines.append(f"  what helps: {note['cure'].replace('RUN_FOLDER', str(folder))}")
    lines = [*note.get("frames", ()), *lines]
    return [*lines, f"  all of it, the traceback included: {RunFolder(folder).failure}"]


def cure_of(error: BaseException) -> str:
    """What helps against a usual mistake; '' where none is known."""
    text = redact(whole_traceback(error))
    return next((cure for pattern, cure in _CURES.items() if re.search(pattern, text)), "")


def memory_text() -> str:
    """This process's memory, and its GPU's."""
    text = f"{psutil.Process().memory_info().rss / 1e9:.2f} GB of {psutil.virtual_memory().total / 1e9:.0f} GB"
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        text += f"; GPU at most {torch.cuda.max_memory_allocated() / 1e9:.2f} of {total / 1e9:.0f} GB"
    return text


def unused_parameters(parameters: Mapping[str, torch.nn.Parameter], message: str) -> list[str]:
    """Names for the parameters in an error of DistributedDataParallel's, which numbers those that it was made for."""
    found = re.search(r"(?:did not receive grad for rank \d+:|Parameter at index) ([\d\s,]+)", message)
    names = list(parameters)
    numbers = map(int, re.findall(r"\d+", found[1])) if found else ()
    return [names[number] for number in numbers if number < len(names)]


def _about_parameters(parameters: Mapping[str, torch.nn.Parameter], message: str) -> str:
    """The message, with the names of the parameters that it numbers."""
    if not (names := unused_parameters(parameters, message)):
        return message
    if "ready only once" in message:
        return f"this parameter had its gradient twice in one backward pass: {', '.join(names)}\n{message}"
    frozen = [name for name in names if not parameters[name].requires_grad]
    later = f"; frozen since the training began: {', '.join(frozen)}" if frozen else ""
    return f"these parameters had no part in the loss: {', '.join(names)}{later}\n{message}"


def _note(evidence: Evidence, error: BaseException, consequence: bool) -> dict[str, Any]:
    message = redact(message_of(error))
    message = _about_parameters(evidence.parts.ranks.strategy.parameters, message)
    # A number that is not finite shows in the optimizer's step, which is seldom its cause.
    section = "" if isinstance(error, ArithmeticError) else getattr(error, "section", "")
    place = evidence.parts.places.get(section)
    state, ranks = evidence.state, evidence.parts.ranks
    return {
        "rank": ranks.rank,
        "host": ranks.host,
        "pid": os.getpid(),
        "time": time.time(),
        "step": state.step,
        "epoch": state.epoch,
        "phase": evidence.activity.phase,
        "error": type(error).__name__,
        "message": message,
        "where": place_of_error(error),
        "frames": [redact(line) for line in frame_lines(error)],
        "forward": _forward(error),
        "config": f"{section} ({place})" if place else "",
        "samples": evidence.samples(error)[:_MOST_SAMPLES],
        "memory": memory_text(),
        "cure": cure_of(error),
        "traceback": redact(whole_traceback(error)),
        "consequence": consequence,
        "bad_loss": not math.isfinite(state.sums["loss"]),
    }


def _forward(error: BaseException) -> str:
    """The line of forward whose backward failed, as far as `trainer.anomaly` has found it; else nothing."""
    lines = {Frame(*frame[:3]): frame[3] for frame in getattr(error, "forward_frames", ())}
    frames = only_own(lines) or list(lines)
    return f"{frames[-1]}: {lines[frames[-1]]}" if frames else ""
