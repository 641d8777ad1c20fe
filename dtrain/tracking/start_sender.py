"""Starts the process that feeds MLflow, and asks MLflow through such a process, so that this one never imports it."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from dtrain.tracking.outage import with_cure
from dtrain.tracking.run_folder import RunFolder
from dtrain.tracking.secrets import redact, secrets_for_child
from dtrain.tracking.uri import resolve_tracking_uri


def prepare_sender(tracking_uri: str | None) -> subprocess.Popen[bytes] | None:
    """Starts a sender before there is a run: while rank 0 imports torch, it imports mlflow and opens the store.

    That takes five seconds of a processor where a sqlite database must be made, which the first steps would feel. Where
    no run comes of it, the sender ends with this process. None where none could be started: the journal then tries.
    """
    try:
        return _start(["--wait"], resolve_tracking_uri(tracking_uri), subprocess.DEVNULL)
    except (OSError, ValueError):
        return None


def assign_run(prepared: subprocess.Popen[bytes] | None, folder: Path, options: Sequence[str]) -> bool:
    """Hands a run folder to a sender from `prepare_sender`; False where it has exited.

    Its pipes stay open: for what the disk does not take, and for what it has to tell.
    """
    if prepared is None or prepared.stdin is None or prepared.stdin.closed or prepared.poll() is not None:
        return False
    try:
        RunFolder(folder).logs.mkdir(exist_ok=True)
        prepared.stdin.write(json.dumps([str(folder), *options]).encode() + b"\n")
        prepared.stdin.flush()
    except OSError:
        return False
    return True


def start_sender(folder: Path, uri: str, options: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    """Starts a sender for a run folder, where its output is logged; without options it delivers what is there.

    With options, it has a pipe for what the disk does not take, and one for what it has to tell.
    """
    RunFolder(folder).logs.mkdir(exist_ok=True)
    with RunFolder(folder).sender_log.open("ab") as output:
        return _start([str(folder), *options], uri, output, has_pipes=bool(options))


def deliver_rest(folder: str) -> int:
    """Sends what a run folder's journal holds and MLflow has not; the sender's exit status, and its output is shown."""
    return subprocess.run(_sender_command(folder), env=_sender_environment(), check=False).returncode


def find_run(run_id: str, uri: str | None = None, timeout_seconds: float = 60.0) -> dict[str, Any]:
    """A run's run_id, status, lifecycle ('active' or 'deleted') and tags; importing mlflow for it takes 3 seconds.

    Raises LookupError where there is no such run or MLflow does not answer; for ValueError see `resolve_tracking_uri`.
    """
    uri = resolve_tracking_uri(uri)
    answer = _ask(uri, "--find", run_id, timeout_seconds)
    if "error" in answer:
        raise LookupError(f"MLflow run {run_id} in {redact(uri)}: {answer['error']}")
    return answer


def probe_store(uri: str, experiment: str, timeout_seconds: float) -> str:
    """Why MLflow at a resolved address cannot be written to; '' where it can."""
    return str(_ask(uri, "--probe", experiment, timeout_seconds).get("error", ""))


def _ask(uri: str, option: str, value: str, timeout_seconds: float) -> dict[str, Any]:
    """What a sender answers; where it does not, why, as {'error': ...}."""
    try:
        command, environment = _sender_command(option, value), _sender_environment(uri)
        done = subprocess.run(
            command, env=environment, input="", capture_output=True, text=True, timeout=timeout_seconds
        )
        answer = dict(json.loads(done.stdout.strip().splitlines()[-1]))
        return answer | ({"error": with_cure(answer["error"])} if answer.get("error") else {})
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {timeout_seconds:g} s"}
    except (ValueError, IndexError):
        return {"error": redact((done.stderr.strip().splitlines() or ["the sender printed nothing"])[-1])}


def _start(
    arguments: Sequence[str], uri: str, output: int | IO[bytes], has_pipes: bool = True
) -> subprocess.Popen[bytes]:
    """A sender in its own process group: Ctrl-C and torchrun's killing of process groups must not reach it.

    Not in its own session: Linux divides processors between sessions first, so its low priority would mean nothing.
    """
    command, environment = _sender_command(*arguments), _sender_environment(uri)
    stdin, stdout = (subprocess.PIPE, subprocess.PIPE) if has_pipes else (subprocess.DEVNULL, output)
    return subprocess.Popen(command, env=environment, stdin=stdin, stdout=stdout, stderr=output, process_group=0)


def _sender_command(*arguments: str) -> list[str]:
    # -P: a file of the current folder named like one of mlflow's many imports must not be taken for it.
    return [sys.executable, "-P", "-m", "dtrain.tracking.sender", *arguments]


def _sender_environment(uri: str | None = None) -> dict[str, str]:
    """The sender's environment: the true URI, which may hold a password, is shown neither by `ps` nor in run.json."""
    return child_environment({} if uri is None else {"MLFLOW_TRACKING_URI": uri})


def child_environment(more: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that works for rank 0: it masks the same secrets, and finds this very package."""
    # numpy under mlflow would start a thread, with its memory, for every core.
    environment = {**os.environ, **more, **secrets_for_child(), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    home = Path(__file__).resolve().parents[2]
    if home.name not in ("site-packages", "dist-packages"):  # run from a checkout
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(home), os.environ.get("PYTHONPATH"))))
    return environment
