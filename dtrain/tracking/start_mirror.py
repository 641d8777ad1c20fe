"""Starts the process that mirrors a run folder, and asks mirrors through such a process: this one has no fsspec."""

import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dtrain.tracking.journal import ctrl_c, how_it_ended
from dtrain.tracking.run_folder import RunFolder, read_run
from dtrain.tracking.secrets import redact
from dtrain.tracking.start_sender import child_environment
from dtrain.tracking.whole_file import read_json

ADDRESS = "DTRAIN_MIRROR_TO"  # the variable in which the process is told where: `ps` shows none
_HOPELESS = 2  # the exit status where no other start would help
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 5.0, 300.0  # before one that died is started again; doubled each time
_SILENT_SECONDS = 5.0  # so long the end waits without a line


def resolve_mirror(address: str, folder: Path) -> str:
    """Where a run folder is mirrored to, as an address that is good from any folder.

    Raises ValueError where that is the run folder itself, in it, or around it.
    """
    text = address.strip()
    if match := re.match(r"([A-Za-z][\w+.-]*)://", text):
        if match[1].lower() not in ("file", "local"):
            return match[1].lower() + text[match.end(1) :].rstrip("/")
        text = text[match.end() :]
    place, own = Path(text).expanduser().absolute().resolve(), folder.absolute().resolve()
    if place.is_relative_to(own) or own.is_relative_to(place):
        raise ValueError(f"{address!r} is the run folder {folder}, lies in it or around it; name another folder")
    return str(place)


def shown(far: Mapping[str, Any]) -> str:
    """Which training a mirror holds, in a few words."""
    name = far.get("run_name") or far.get("experiment") or "unnamed"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(far.get("attempt_started") or 0))
    return f"{name}, last started {since} on {far.get('host')}"


class Mirror:
    """The mirror of a run folder, kept up by a process of its own, which is started again if it dies.

    Args:
        address: From `resolve_mirror`.
        exit_timeout_seconds: How long `finish` waits at most until everything is there.
        say: What shows a person a line, from another thread.
    """

    def __init__(self, address: str, exit_timeout_seconds: float, say: Callable[[str], object]) -> None:
        self.address, self.exit_timeout_seconds, self._say = address, exit_timeout_seconds, say
        self.accepts: float | None = None  # the start that wrote it last, if what is here is to replace that
        self._folder = Path()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._ends, self._is_closed = threading.Event(), False

    def start(self, folder: Path) -> None:
        """Begin to mirror a run folder, whose run is open. A thread waits for the process: no step looks after it."""
        self._folder, self._is_closed = Path(folder).absolute(), False
        self._ends.clear()
        self._thread = threading.Thread(target=self._keep_running, name="the mirror's process", daemon=True)
        self._thread.start()

    def _keep_running(self) -> None:
        pause, is_told = _FIRST_PAUSE_SECONDS, False
        accepts = [] if self.accepts is None else ["--accepts", repr(self.accepts)]
        while not self._is_closed:
            how = ""
            try:
                self._process = _start(self.address, str(self._folder), "--parent", str(os.getpid()), *accepts)
            except OSError as error:
                how = f"could not be started: {error}"
            else:
                if self._ends.is_set():
                    _say_done(self._process)
                with self._process.stdout as lines:  # type: ignore[union-attr]
                    for line in lines:
                        self._say(redact(line.decode(errors="replace").strip()))
                if (status := self._process.wait()) in (0, _HOPELESS) or self._is_closed:
                    return
                how = how_it_ended(status)
            if not is_told and not self._ends.is_set():
                is_told = True
                log = RunFolder(self._folder).mirror_log
                self._say(f"the mirror's process {how}, see {log}; it is started again, and continues where it was")
            self._ends.wait(0.5 if self._ends.is_set() else pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def finish(self, seconds: float | None = None) -> str:
        """Wait until the mirror has everything of a run that has ended, at most so long; '' or what it lacks.

        The default is `exit_timeout_seconds`. Ctrl-C ends the wait.
        """
        if self._thread is None:
            return ""
        deadline = time.monotonic() + (self.exit_timeout_seconds if seconds is None else seconds)
        self._ends.set()
        if self._process is not None:
            _raise_priority(self._process.pid)
            _say_done(self._process)
        say_at = time.monotonic() + _SILENT_SECONDS
        with ctrl_c("the mirror") as is_interrupted:
            while self._thread.is_alive() and (now := time.monotonic()) < deadline and not is_interrupted():
                if now >= say_at:
                    say_at = float("inf")
                    self._say(f"waiting for the mirror, {deadline - now:.0f} s more at most; Ctrl-C ends the wait")
                self._thread.join(0.1)
        self._is_closed = True
        process, self._thread = self._process, None
        if process is not None and process.poll() is None:
            process.kill()  # safe at any moment: what is not whole there is not there
            process.wait()
        if process is None or process.returncode:
            return self._lack()
        if say_at == float("inf"):  # a person was told to wait
            self._say("the mirror has all of this run")
        return ""

    def send_later(self, folder: Path) -> None:
        """Have a process bring what is left of a run that nobody continues; it ends by itself."""
        RunFolder(folder).logs.mkdir(exist_ok=True)
        with RunFolder(folder).mirror_log.open("ab") as log:
            subprocess.Popen(
                _command(str(folder.absolute())), env=child_environment({ADDRESS: self.address}),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0,
            )  # fmt: skip

    def _lack(self) -> str:
        left = read_json(RunFolder(self._folder).mirror)
        why = left.get("problem") or f"see {RunFolder(self._folder).mirror_log}"
        if left.get("waiting") and not left.get("problem"):
            why = f"{left['waiting']} checkpoints or files were still on their way"
        rest = f"send the rest with: dtrain sync {shlex.quote(str(self._folder))}"
        return f"the mirror ({redact(self.address)}) does not have all of this run yet: {why}. Nothing is lost; {rest}"


def look_at_mirror(
    address: str,
    probe: bool = True,
    timeout_seconds: float = 60.0,
    say: Callable[[str], object] = lambda _: None,
    silent_seconds: float = _SILENT_SECONDS,
) -> dict[str, Any]:
    """Which run a mirror holds: `run`, `checkpoints` by name, `bytes`, `files`; where it cannot be asked: `error`.

    `is_mistake` is then whether it is one of the user's. With `probe` a small file is written and removed. After
    `silent_seconds` a person is told through `say` what is waited for.
    """
    left = timeout_seconds - silent_seconds
    try:
        with _start(address, "--probe" if probe else "--look", errors=subprocess.PIPE) as process:
            try:
                return _last_line(*process.communicate(timeout=silent_seconds))
            except subprocess.TimeoutExpired:
                say(f"waiting for the mirror ({redact(address)}), {left:.0f} s more at most")
            try:
                return _last_line(*process.communicate(timeout=left))
            except subprocess.TimeoutExpired:
                process.kill()
                return {"error": f"no answer within {timeout_seconds:g} s", "is_mistake": False}
    except OSError as error:
        return {"error": f"its process could not be started: {error}", "is_mistake": False}


class Fetching:
    """A process that copies a mirror into a folder; what an earlier one left there is not copied again."""

    def __init__(self, address: str, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._process = _start(address, str(folder), "--fetch", errors=subprocess.PIPE)

    def wait(self, seconds: float) -> dict[str, Any] | None:
        """What it has found (`links`) or the `error`; None while it is at work after so long."""
        try:
            return _last_line(*self._process.communicate(timeout=seconds))
        except subprocess.TimeoutExpired:
            return None

    def end(self) -> None:
        """End it, should it still be at work."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


def finish_mirror(folder: Path) -> int:
    """Bring what is left of a run to its mirror, if it has one; the exit status, and what is found is printed."""
    address = str(read_run(folder).get("mirror_to") or "")
    if not address:
        return 0
    if "***" in address:
        if not (address := os.environ.get(ADDRESS, "")):
            print(
                f"the mirror's address had a password, which is stored nowhere: give it as {ADDRESS}", file=sys.stderr
            )
            return 1
        address = resolve_mirror(address, folder)
    command, environment = _command(str(folder)), child_environment({ADDRESS: address})
    return subprocess.run(command, env=environment, check=False).returncode


def _start(address: str, *arguments: str, errors: int | None = None) -> subprocess.Popen[bytes]:
    """In its own process group: neither Ctrl-C nor torchrun's killing of process groups reaches it."""
    return subprocess.Popen(
        _command(*arguments), env=child_environment({ADDRESS: address}), stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=errors, process_group=0,
    )  # fmt: skip


def _command(*arguments: str) -> list[str]:
    # -P: a file of the current folder named like one of fsspec's imports must not be taken for it.
    return [sys.executable, "-P", "-m", "dtrain.tracking.mirror", *arguments]


def _say_done(process: subprocess.Popen[bytes]) -> None:
    """Tell it that nothing more is written. Its pipe may be open in forked workers, too."""
    with suppress(OSError, ValueError):  # it has died, or was told
        process.stdin.write(b"done")  # type: ignore[union-attr]
        process.stdin.close()  # type: ignore[union-attr]


def _last_line(answer: bytes, errors: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(answer.decode().strip().splitlines()[-1]))
    except (ValueError, IndexError):
        lines = errors.decode(errors="replace").strip().splitlines()
        return {"error": redact((lines or ["its process printed nothing"])[-1]), "is_mistake": False}


def _raise_priority(pid: int) -> None:
    with suppress(OSError):  # only root may
        os.setpriority(os.PRIO_PROCESS, pid, 0)  # no step is left to be disturbed
