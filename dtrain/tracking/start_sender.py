"""Starts the process that feeds MLflow, and asks it."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dtrain.tracking.secrets import redact, secrets_for_child
from dtrain.tracking.uri import resolve_tracking_uri


def probe_store(uri: str, experiment: str, timeout_seconds: float) -> str:
    """Why MLflow at a resolved address cannot be written to, found out in a process of its own; '' where it can."""
    answer = ask_sender(uri, "--probe", experiment, timeout_seconds=timeout_seconds)
    return str(answer.get("error", ""))


def ask_sender(uri: str, *words: str, timeout_seconds: float) -> dict[str, Any]:
    """What a sender answers; where it does not, why, as {'error': ...}."""
    try:
        done = subprocess.run(
            _sender_command(*words),
            env=_sender_environment(uri),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
        )
        return dict(json.loads(done.stdout.strip().splitlines()[-1]))
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {timeout_seconds:g} s"}
    except (ValueError, IndexError):
        return {"error": redact((done.stderr.strip().splitlines() or ["the sender said nothing"])[-1])}


def prepare_sender(tracking_uri: str | None) -> subprocess.Popen[bytes] | None:
    """Starts a sender before there is a run: while rank 0 imports torch, it imports mlflow and opens the store.

    That takes five seconds of a processor where a sqlite database must be made, which the first steps would feel. Where
    no run comes of it, the sender ends with this process.

    Args:
        tracking_uri: see `resolve_tracking_uri`.

    Returns:
        what Journal takes; None where none could be started, which the journal then tries, and says.
    """
    try:
        return start_process(["--wait"], resolve_tracking_uri(tracking_uri), subprocess.PIPE, subprocess.DEVNULL)
    except (OSError, ValueError):
        return None


def deliver_rest(folder: str) -> int:
    """Sends what a run's journal holds and MLflow has not; the sender's exit status, its words are shown as they come.

    Args:
        folder: the run folder, whose run.json knows the store.
    """
    return subprocess.run(_sender_command(folder), env=_sender_environment(), check=False).returncode


def start_process(words: Sequence[str], uri: str, stdin: int, output: Any) -> subprocess.Popen[bytes]:
    """A sender in its own process group: Ctrl-C and torchrun's killing of process groups must not reach it.

    Not in its own session: Linux shares processors out by session first, so that its low priority would mean nothing.
    """
    return subprocess.Popen(
        _sender_command(*words),
        env=_sender_environment(uri),
        stdin=stdin,
        stdout=output,
        stderr=output,
        process_group=0,
    )


def tell_sender(sender: subprocess.Popen[bytes], words: Sequence[str]) -> bool:
    """Gives a sender that waits its command line; False where it does not wait or has died."""
    if sender.stdin is None or sender.stdin.closed:
        return False
    try:
        with sender.stdin as pipe:
            pipe.write(json.dumps(words).encode() + b"\n")
    except OSError:
        return False
    return True


def _sender_command(*arguments: str) -> list[str]:
    # -P: a file of the current folder named like one of mlflow's many imports must not be taken for it.
    return [sys.executable, "-P", "-m", "dtrain.tracking.sender", *arguments]


def _sender_environment(uri: str | None = None) -> dict[str, str]:
    """The sender's environment: the true URI, which may hold a password, is shown neither by `ps` nor in run.json."""
    environment = dict(os.environ) if uri is None else {**os.environ, "MLFLOW_TRACKING_URI": uri}
    # numpy under mlflow would start a thread, with its memory, for every core.
    environment |= secrets_for_child() | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    home = Path(__file__).resolve().parents[2]
    if home.name not in ("site-packages", "dist-packages"):  # run from a checkout
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(home), os.environ.get("PYTHONPATH"))))
    return environment
