"""What a process says last when it fails: the user's own lines, then the card. The whole traceback goes to the log."""

import os
import sys
from contextlib import suppress
from pathlib import Path

from dtrain.distributed.environment import environment, is_main
from dtrain.distributed.launched_rank import is_read_by_launcher, tell_torchrun
from dtrain.launch.console import ONLY_LOGGED
from dtrain.reporting.events import note_ending
from dtrain.reporting.own_frames import SHOWS_ALL, frame_lines, message_of, one_line_of, place_of_error, whole_traceback
from dtrain.tracking.secrets import redact
from dtrain.training.failure_card import cure_of


def say_last(error: BaseException, log: Path | None = None) -> None:
    """Show an error on stderr: on the main rank its card; what every rank knows of its own goes into its log.

    Args:
        error: With `failure_card` where a training has failed, see `training.failure_card`; `[]`: rank 0 shows it.
        log: This rank's log, where it is to get the traceback from here.
    """
    whole = redact(whole_traceback(error))
    tell_torchrun(_in_one_line(error))
    note_ending(reason=_in_one_line(error))
    card: list[str] | None = getattr(error, "failure_card", None)
    if os.environ.get(SHOWS_ALL):
        _show(whole.splitlines())  # it ends with the card, which is a note of the error
        return
    if is_read_by_launcher():
        _show([f"{ONLY_LOGGED}{line}" for line in whole.splitlines()])
    elif log is not None:
        with suppress(OSError):
            log.parent.mkdir(exist_ok=True)
            with log.open("a", encoding="utf-8") as file:
                file.write(whole)
    if card is None:
        _show([*frame_lines(error), *_plain_card(error)])
    elif card:
        _show(card)
    elif environment().launcher not in ("torchrun", "none") and not is_read_by_launcher():
        _show([f"rank {environment().rank}: {_in_one_line(error)}"])  # rank 0 may be gone


def _in_one_line(error: BaseException) -> str:
    place = place_of_error(error)
    return redact(one_line_of(error) + (f" ({place})" if place else ""))


def _plain_card(error: BaseException) -> list[str]:
    """Of an error outside of a training, as in `dtrain check`."""
    rank = "" if is_main() else f"rank {environment().rank}: "
    cure = cure_of(error)
    lines = [f"{rank}{redact(one_line_of(error))}"]
    lines += [
        f"  {redact(line)}" for line in message_of(error).splitlines()[1:5] if not line.startswith("while loading ")
    ]
    lines += [f"  at {place}"] if (place := place_of_error(error)) else []
    lines += [f"  what helps: {cure}"] if cure else []
    return [*lines, "  the whole traceback: --traceback"]


def _show(lines: list[str]) -> None:
    print("\n".join(lines), file=sys.stderr, flush=True)
