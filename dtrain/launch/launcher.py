"""`dtrain launch`: N ranks here, or one node of many, and their true exit status; knows nothing of what they train."""

import argparse
import logging
import math
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import psutil

from dtrain.config.errors import ConfigError, Mistake, one_line
from dtrain.distributed.environment import Environment, cores
from dtrain.distributed.exit_status import INTERRUPTED, STOPPED_EARLY
from dtrain.distributed.setup import choose_device
from dtrain.distributed.stop import REPEAT_SECONDS, end_at_once, heeded
from dtrain.launch.console import Console
from dtrain.tracking.run_folder import RunFolder, close_run_of, lives, read_run
from dtrain.tracking.whole_file import read_json

if TYPE_CHECKING:
    from dtrain.distributed.process import Launch
    from dtrain.launch.agent import AgentThread, End

DONE, FAILED, USAGE = 0, 1, 2
SHUTDOWN_SECONDS = (600.0, 60.0, 3.0)  # to save in: before a save was timed; beside the last save's time, and its times
AT_ONCE_SECONDS = 3.0  # after a second Ctrl-C
_KNOCK_SECONDS = 3.0
_ELSEWHERE = "192.0.2.1"  # nobody's, RFC 5737


def add_options(command: argparse.ArgumentParser) -> None:
    """The command line of `dtrain launch`, beside CONFIG and KEY=VALUE."""
    command.add_argument(
        "--nproc-per-node", metavar="N|auto", default="auto", help="ranks here; auto: all GPUs, else 1"
    )
    command.add_argument("--nnodes", metavar="N", type=_count, default=1, help="how many machines (default 1)")
    command.add_argument("--rdzv-endpoint", metavar="HOST:PORT", help="where the nodes meet: one of them, and a port")
    command.add_argument("--rdzv-id", metavar="ID", default="dtrain", help="tells jobs apart that meet at one endpoint")
    command.add_argument(
        "--max-restarts",
        metavar="N",
        type=_natural,
        default=0,
        help="start failed ranks again, from the last checkpoint",
    )
    command.add_argument("--launcher", choices=("torchrun", "accelerate"), default="torchrun", help="whose settings")
    command.add_argument("--log-dir", metavar="DIR", type=Path, help="default: logs in the run folder")


def _natural(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a whole number, not {text!r}")
    return int(text)


def _count(text: str) -> int:
    if _natural(text) == 0:
        raise argparse.ArgumentTypeError("expected 1 or more")
    return int(text)


def launch(options: argparse.Namespace) -> int:
    """Check the config, then start the ranks and wait for their end.

    Returns:
        The exit status: 0 done, 1 failed, 2 config or command line wrong, 75 stopped early with its checkpoint written,
        130 ended by a second Ctrl-C.

    Raises:
        ConfigError: With every mistake that can be found; nothing was started then.
    """
    from dtrain.config.check import check
    from dtrain.config.errors import to_plain
    from dtrain.config.load import load_config, run_folder
    from dtrain.tracking.secrets import keep_secret

    config = load_config(options.config, options.overrides)
    keep_secret(to_plain(config))  # the ranks' output is masked here
    check(config, "train")
    host, port = _endpoint(options)
    end_at_once(lambda line: print(line, file=sys.stderr, flush=True))
    ranks = _ranks_here(options, config)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // ranks)))
    if options.launcher == "accelerate":
        os.environ.update(_accelerate_settings(ranks))
    is_host = _is_host(host, port, options.nnodes)
    address = _address_towards(host, port) if options.nnodes > 1 else "127.0.0.1"
    if options.nnodes > 1:
        _have_gloo_use(address)

    from dtrain.launch.agent import Site

    words = ("-m", "dtrain", "train", options.config, *options.overrides)
    job = options.rdzv_id if options.nnodes > 1 else uuid.uuid4().hex
    site = Site(
        ranks, options.nnodes, f"{host}:{port}", is_host, address, job, (sys.executable, *words), options.max_restarts
    )
    return _Job(site, run_folder(config), options.log_dir, (config.get("trainer") or {}).get("resume") == "none").run()


def _wrong(text: str) -> ConfigError:
    return ConfigError(Mistake(text))


def _endpoint(options: argparse.Namespace) -> tuple[str, int]:
    """Where the nodes meet. A node on its own meets nobody: any free port will do."""
    if options.rdzv_endpoint is None:
        if options.nnodes > 1:
            raise _wrong(f"--nnodes {options.nnodes} needs --rdzv-endpoint HOST:PORT, the same on each node")
        return "localhost", 0
    host, _, port = options.rdzv_endpoint.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise _wrong(f"--rdzv-endpoint {options.rdzv_endpoint}: expected HOST:PORT, such as node1:29500")
    return host.strip("[]"), int(port)


def _ranks_here(options: argparse.Namespace, config: Mapping[str, Any]) -> int:
    """How many ranks this node gets, known to have their devices."""
    import torch

    gpus, wish = torch.cuda.device_count(), str(config.get("device") or "auto")
    given = options.nproc_per_node
    if given != "auto" and (not given.isdigit() or given == "0"):
        raise _wrong(f"--nproc-per-node {given}: expected a number from 1 on, or auto")
    ranks = int(given) if given != "auto" else max(1, gpus) if wish in ("auto", "cuda") else 1
    backend = ((config.get("trainer") or {}).get("ddp") or {}).get("backend")
    choose_device(wish, Environment(0, 0, ranks * options.nnodes, ranks, "torchrun"), gpus, backend)
    return ranks


def _accelerate_settings(ranks: int) -> dict[str, str]:
    """What `accelerate launch` gives its ranks: the settings of the user's `accelerate config`, as variables."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    logging.getLogger("accelerate").setLevel(logging.ERROR)
    given = ["--num_processes", str(ranks), "--num_machines", "1", "--main_process_port", "0", "-m", "dtrain"]
    try:
        arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(given))
        settings: dict[str, str] = prepare_multi_gpu_env(arguments)
    except (ValueError, RuntimeError, ImportError) as error:
        raise _wrong(f"--launcher accelerate: {error}") from None
    if arguments.use_deepspeed or arguments.tpu:
        raise _wrong("--launcher accelerate: its config asks for DeepSpeed or TPUs, which dtrain does not train with")
    return settings


def _is_host(host: str, port: int, nodes: int) -> bool:
    """Whether the rendezvous is to be held here.

    Raises:
        ConfigError: Here, but something else has the port; or there is no such host.
    """
    try:
        addresses = {found[4][0] for found in socket.getaddrinfo(host, None)}
    except OSError as error:
        raise _wrong(f"--rdzv-endpoint {host}:{port}: {host} is unknown here: {error.strerror}") from None
    own = {address.address.partition("%")[0] for each in psutil.net_if_addrs().values() for address in each}
    if not addresses & own and not any(str(address).startswith("127.") for address in addresses):
        if nodes == 1:
            raise _wrong(f"--rdzv-endpoint {host}:{port} is on another machine; one node alone needs none")
        return False
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            return True
        except OSError:
            if nodes > 1 and _is_rendezvous(host, port):  # held by another node's launcher on this machine
                return False
    raise _wrong(f"--rdzv-endpoint {host}:{port}: port {port} is in use{_owner_of(port)}; take another one")


def _is_rendezvous(host: str, port: int) -> bool:
    """Whether one of torch's stores listens there; anything else may never answer, and torch would wait for it."""
    import torch.distributed as dist

    found = threading.Event()

    def knock() -> None:
        with suppress(Exception):
            dist.TCPStore(host, port, is_master=False, wait_for_workers=False)  # type: ignore[attr-defined]
            found.set()

    threading.Thread(target=knock, daemon=True).start()
    return found.wait(_KNOCK_SECONDS)


def _owner_of(port: int) -> str:
    with suppress(psutil.Error, OSError):
        for found in psutil.net_connections("tcp"):
            if found.laddr and found.laddr.port == port and found.status == psutil.CONN_LISTEN and found.pid:
                return f" by process {found.pid} ({psutil.Process(found.pid).name()})"
    return ""


def _address_towards(host: str, port: int) -> str:
    """The address under which this machine is seen from the rendezvous; its name may mean something else there."""
    with suppress(OSError):
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(place)  # of UDP: nothing is sent
            address = str(probe.getsockname()[0])
            if not address.startswith("127.") and address != "::1":
                return address
    return host


def _have_gloo_use(address: str) -> None:
    """Gloo would take the interface of the machine's name, which is often the loopback (127.0.1.1 in /etc/hosts).

    Args:
        address: This machine's; where it is a name, what leads to everybody else is taken.
    """
    if address.strip("0123456789.") and ":" not in address:
        address = _address_towards(_ELSEWHERE, 1)
    for name, found in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in found):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


class _Job:
    """The ranks of this node, from their start to the exit status.

    Args:
        site: This node's part.
        folder: The run folder.
        log_folder: Where to write what the ranks print. Default: logs in the run folder.
        is_new: Whether an old run folder will be moved aside first.
    """

    def __init__(self, site: Any, folder: Path, log_folder: Path | None, is_new: bool) -> None:
        self.site, self.folder = site, folder.absolute()
        logs = (log_folder or RunFolder(self.folder).logs).absolute()
        self.waits_for_first_step = is_new and log_folder is None
        self.is_terminal = sys.stdout.isatty()
        self.console = Console(logs, self.is_terminal)
        self.ends: list[End] = []
        self.asked: list[signal.Signals] = []  # the requests to stop, in the order in which they came
        self.asked_at: list[float] = []
        self.start_began, self.has_begun, self.restarts = time.time(), False, 0

    def run(self) -> int:
        """Start the ranks, pass signals on, and say how it ended."""
        from dtrain.launch.agent import AgentThread

        for name in ("torch.distributed.elastic.multiprocessing.api", "torch.distributed.elastic.agent.server.api"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # what they have to say is said here
        private = Path(tempfile.mkdtemp(prefix="dtrain-launch-"))
        for number in (*heeded(), signal.SIGQUIT):
            signal.signal(number, self._take)
        agent = AgentThread(self.site, private, str(self.console.log_folder), self._listen, self._ended)
        agent.start()
        self._see_to_end(agent)
        self.console.drain()
        self._close_run()
        status = self._status(agent.raised)
        shutil.rmtree(private, ignore_errors=True)
        sys.stdout.flush()
        sys.stderr.flush()
        if agent.is_alive():
            os._exit(status)  # it waits for other nodes; ranks that are still there end with this process
        return status

    def shutdown_seconds(self) -> float:
        """How long ranks may take to save and end: by the last save's time, where that is known."""
        unknown, least, times = SHUTDOWN_SECONDS
        last = read_run(self.folder).get("save_seconds")
        return unknown if last is None else least + times * float(last)

    def _listen(self, launch: "Launch", local_rank: int, rank: int) -> None:
        """Rank 0 keeps a terminal, with its live bar, for itself; all else goes through pipes."""
        self.start_began, self.has_begun, self.ends = time.time(), False, []
        if not (rank == 0 and self.is_terminal):
            mark = launch.mark(local_rank) if self.waits_for_first_step else None
            self.console.listen(launch.pipe(local_rank), rank, mark)

    def _take(self, number: int, _frame: FrameType | None) -> None:
        self.asked.append(signal.SIGTERM if number == signal.SIGQUIT else signal.Signals(number))
        self.asked_at.append(time.monotonic())

    def _is_immediate(self) -> float | None:
        """When the second Ctrl-C came, if it did; a terminal may deliver the first one several times."""
        times = [at for at, number in zip(self.asked_at, self.asked, strict=False) if number == signal.SIGINT]
        return next((at for at in times[1:] if at > times[0] + REPEAT_SECONDS), None)

    def _see_to_end(self, agent: "AgentThread") -> None:
        """Wait for the agent; what is asked of this process is asked of every rank, those included that start later."""
        told: dict[int, int] = {}
        while agent.is_alive():
            agent.join(0.05)
            if not self.asked:
                continue
            processes = agent.processes
            for process in processes:
                for number in self.asked[told.get(process, 0) :]:
                    _send(process, number)
                told[process] = len(self.asked)
            now, at_once = time.monotonic(), self._is_immediate()
            limit = AT_ONCE_SECONDS if at_once else self.shutdown_seconds()
            if now > (at_once or self.asked_at[0]) + limit:
                for process in processes:
                    _send(process, signal.SIGKILL)
                if not at_once:
                    self.console.say(
                        f"dtrain launch: ranks had not ended {limit:.0f} s after they were asked to: killed"
                    )
                agent.join(AT_ONCE_SECONDS)
                return
            if not processes:
                return  # it waits for other nodes: nothing is to be saved

    def _ended(self, ends: "list[End]", has_begun: bool, can_restart: bool) -> bool:
        """All ranks here are over: whether the agent may start them again, if it would."""
        self.ends, self.has_begun = ends, has_begun
        final = {USAGE, STOPPED_EARLY, INTERRUPTED} & {end.status for end in ends if end.spoke < math.inf}
        if not can_restart or not has_begun or self.asked or final:
            return False
        self.console.drain()
        self.restarts += 1
        again = f"restart {self.restarts} of {self.site.max_restarts}, from the last checkpoint"
        self.console.say("\n".join([*self._first_failure(), f"dtrain launch: {again}"]))
        self.ends, self.has_begun = [], False  # of the start to come
        return True

    def _close_run(self) -> None:
        """Say of a rank 0 of this node that it died, where it has no sender that does: MLflow may be missing."""
        facts = read_run(self.folder)
        is_ours = any(end.rank == 0 for end in self.ends) and facts.get("attempt_started", 0.0) >= self.start_began
        if is_ours and facts.get("state") == "RUNNING" and not lives(facts):
            with suppress(OSError):
                close_run_of(self.folder, facts["pid"])

    def _status(self, raised: BaseException | None) -> int:
        """The true exit status of this node's ranks, and what there is to say about it."""
        statuses = {end.status if end.spoke < math.inf or end.status else FAILED for end in self.ends}
        stopped = INTERRUPTED if self.asked[:1] == [signal.SIGINT] else STOPPED_EARLY
        if self._is_immediate():
            return INTERRUPTED
        if USAGE in statuses:
            return USAGE
        if any(end.rank == 0 and end.status == STOPPED_EARLY and end.spoke < math.inf for end in self.ends):
            return STOPPED_EARLY  # its checkpoint is written
        if self.asked and not self.has_begun and statuses != {DONE}:  # before the first step nothing can be lost
            return stopped
        if statuses - {DONE, STOPPED_EARLY, INTERRUPTED}:
            self.console.say("\n".join(self._first_failure()))
            return FAILED
        if not statuses:
            self.console.say(f"dtrain launch: {self._why_not(raised)}")
            return FAILED
        return max(statuses)

    def _why_not(self, raised: BaseException | None) -> str:
        """Why no rank was started, or not again."""
        kind = type(raised).__name__
        if kind == "RendezvousConnectionError":
            return f"no rendezvous at {self.site.endpoint}: its node is not there, or no longer"
        if kind == "RendezvousTimeoutError":
            return f"not all of the {self.site.nodes} nodes came to {self.site.endpoint}"
        if kind == "RendezvousClosedError":
            return "another node has ended the job"
        return one_line(f"{kind}: {raised}")

    def _first_failure(self) -> list[str]:
        """Which rank failed first, how, where its output is, and its traceback."""
        note = read_json(RunFolder(self.folder).failure)
        if note.get("time", 0.0) < self.start_began:  # of another start, or of another machine's disk
            note = {}
        silent = note.get("silent_ranks")
        rank = silent[0] if silent else note["rank"] if note else min(self.ends, key=_order).rank
        end = next((end for end in self.ends if end.rank == rank), None)
        what = f": {note['error']}: {(note['message'].splitlines() or [''])[0]}" if note and not silent else ""
        facts = [] if end is None else [_how(end)]
        if end is not None and not (rank == 0 and self.is_terminal):
            facts.append(f"its output: {self.console.log_folder}/rank-{rank}.log")
        trace = "" if silent else note.get("traceback", "") if note else self.console.traceback_of(rank)
        head = f"dtrain launch: rank {rank} failed first{what}" + (f" ({'; '.join(facts)})" if facts else "")
        return [head, *trace.rstrip().splitlines()]


def _order(end: "End") -> tuple[int, float]:
    """The likelier cause first: a rank that sees another one go raises, and has status 1."""
    if end.status < 0:
        return (0 if end.status != -signal.SIGTERM else 4), end.spoke
    if end.status == DONE:
        return (1 if end.spoke == math.inf else 5), end.spoke
    return (3 if end.status == FAILED else 2), end.spoke


def _how(end: "End") -> str:
    if end.status < 0:
        return f"killed by {signal.Signals(-end.status).name}"
    return f"exit status {end.status}" + ("" if end.spoke < math.inf else ", without a word")


def _send(process: int, number: int) -> None:
    """A signal to a rank, if it is there still: its number may be another process's by now."""
    with suppress(psutil.Error, ProcessLookupError):
        if psutil.Process(process).ppid() == os.getpid():
            os.kill(process, number)
