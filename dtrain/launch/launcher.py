"""`dtrain launch`: starts N ranks here, or one node of many, supervises them, and ends with their true exit status."""

import argparse
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from dtrain.checkpoint.spare_memory import MEMORY, save_what_is_kept
from dtrain.config.errors import ConfigError, one_line
from dtrain.config.load import run_folder
from dtrain.distributed.affinity import VARIABLE as AFFINITY
from dtrain.distributed.affinity import raise_open_files
from dtrain.distributed.device import choose_device
from dtrain.distributed.environment import Environment, cores, node_name
from dtrain.distributed.exit_status import DONE, FAILED, INTERRUPTED, STOPPED_EARLY, WRONG_CONFIG
from dtrain.distributed.launched_rank import Launch
from dtrain.distributed.process import end_processes
from dtrain.distributed.stop_request import REPEAT_SECONDS, stop_signals
from dtrain.launch.agent import CUT_OFF_SECONDS, Agent, End, Site, Supervisor
from dtrain.launch.console import Console
from dtrain.launch.rendezvous import address_towards, is_held_here, set_gloo_interface
from dtrain.reporting.own_frames import in_one_line
from dtrain.tracking.bad_nodes import LEFT_OUT, USES_BAD_NODES, bad_nodes, note_failed_node
from dtrain.tracking.run_folder import RunFolder, close_run_of, file_instead, lives, read_run, why_not_writable
from dtrain.tracking.run_lock import writer_of
from dtrain.tracking.whole_file import read_json

UNTIMED_SAVE_SECONDS = 600.0  # ranks have so long to save and end before a save was timed
SHUTDOWN_SECONDS, SHUTDOWN_SAVES = 60.0, 3.0  # afterwards so long, and so many times what the last save took
KILL_SECONDS = 3.0  # after a second Ctrl-C
ENDINGS = {DONE: "FINISHED", STOPPED_EARLY: "KILLED", INTERRUPTED: "KILLED"}  # rank 0's exit status: how its run ended
HARDWARE = re.compile(r"uncorrectable ECC|hardware|NVLink|off the bus|unspecified launch failure")  # of CUDA's errors
NO_RENDEZVOUS = {  # torch's exceptions in words; of the site's attributes
    "RendezvousConnectionError": "no rendezvous at {endpoint}: its node has not started, or is gone",
    "RendezvousTimeoutError": "not all of the {nodes_text} nodes joined at {endpoint}",
    "RendezvousClosedError": "another node has ended the job",
    "DistNetworkError": "the rendezvous at {endpoint} is gone, and the job with it; start it again on all nodes",
    "DistStoreError": "the rendezvous at {endpoint} has not answered in time; start the job again on all nodes",
}


def launch(config: Mapping[str, Any], options: argparse.Namespace, host: str, port: int) -> int:
    """Start the ranks of a checked config, and wait for their end; the exit statuses are those of docs/launch.md.

    `options.nnodes` is the most nodes that there are, its `fewest` how many are enough.

    Raises:
        ConfigError: The options do not fit this machine; nothing was started then.
    """
    ranks = _ranks_here(options, config)
    nodes = int(options.nnodes)
    machines = nodes + options.spares
    _refuse_folder(config, machines)
    _refuse_bad_node(run_folder(config))
    raise_open_files()  # where rank 0 is, the launcher's store has a connection with each rank of the job
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // ranks)))
    if options.affinity is not None:
        os.environ[AFFINITY] = options.affinity
    if options.launcher == "accelerate":
        os.environ.update(_accelerate_settings(ranks))
    is_host = is_held_here(host, port, machines)
    address, job = "127.0.0.1", uuid.uuid4().hex
    if machines > 1:
        address, job = address_towards(host, port), options.rdzv_id
        set_gloo_interface(address)
    command = (sys.executable, "-m", "dtrain", "train", options.config, *options.overrides)
    site = Site(ranks, nodes, f"{host}:{port}", is_host, address, job, command, options.max_restarts)
    if options.nnodes.fewest < nodes or options.spares:
        site = site._replace(fewest=options.nnodes.fewest, spares=options.spares)
        if options.nnodes.fewest < nodes:  # else none joins but in the place of another
            site = site._replace(join_every=options.join_every)
        site = site._replace(max_restarts=max(options.max_restarts, options.spares))  # what spares are there for
    is_new = (config.get("trainer") or {}).get("resume") == "none"
    run = NodeRun(site, run_folder(config), options.log_dir, is_new)
    run.memory = Path((config.get("trainer") or {}).get("spare_memory_dir") or MEMORY)
    return run.run()


def _ranks_here(options: argparse.Namespace, config: Mapping[str, Any]) -> int:
    """How many ranks this node gets, known to have their devices."""
    gpus, device = torch.cuda.device_count(), config.get("device") or "auto"
    given = options.nproc_per_node
    if given == "auto":
        first = device if isinstance(device, str) else device[0]
        ranks = max(1, gpus) if first in ("auto", "cuda") else 1
    elif given.isdigit() and int(given) > 0:
        ranks = int(given)
    else:
        raise ConfigError(f"--nproc-per-node {given}: expected a number from 1 on, or auto")
    backend = ((config.get("trainer") or {}).get("ddp") or {}).get("backend")
    choose_device(device, Environment(0, 0, ranks * options.nnodes, ranks, "torchrun"), gpus, backend)
    return ranks


def _refuse_folder(config: Mapping[str, Any], machines: int) -> None:
    """Raise a ConfigError where no rank could write the run folder, before this launcher writes a log in it."""
    folder = run_folder(config)
    if file := file_instead(folder):
        raise ConfigError(f"trainer.checkpoint_dir: {file} is a file, expected a folder")
    # Of several machines, another one's rank 0 may have begun already.
    if machines == 1 and (busy := writer_of(folder)):
        raise ConfigError(busy)
    if problem := why_not_writable(folder):
        raise ConfigError(f"trainer.checkpoint_dir: {folder} cannot be written: {problem}")


def _refuse_bad_node(folder: Path) -> None:
    """Raise a ConfigError on a node that is to be left out, but where a batch job has no other."""
    file, node = RunFolder(folder).bad_nodes, node_name()
    if node in os.environ.get(LEFT_OUT, "").split(","):
        raise ConfigError(f"{node} is left out: a spare takes its place, see the lines of `dtrain job`")
    if text := bad_nodes(folder).get(node):
        if USES_BAD_NODES not in os.environ:
            raise ConfigError(f"{node} is left out: {text}; remove its line from {file} to use it again")
        print(f"dtrain launch: {node} is used although it is in {file}: {text}", file=sys.stderr, flush=True)


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
        raise ConfigError(f"--launcher accelerate: {error}") from None
    if arguments.use_deepspeed or arguments.tpu:
        raise ConfigError("--launcher accelerate: its config asks for DeepSpeed or TPUs, which dtrain does not use")
    return settings


class NodeRun:
    """The ranks of this node, from their start to the exit status.

    What they print goes into `log_folder`, by default logs in the run folder; `is_new` says that an old run folder will
    be moved aside first.
    """

    def __init__(self, site: Site, folder: Path, log_folder: Path | None, is_new: bool) -> None:
        self.site, self.folder = site, folder.absolute()
        self.waits_for_first_step = is_new and log_folder is None
        self.is_terminal = sys.stdout.isatty()
        self.console = Console((log_folder or RunFolder(self.folder).logs).absolute(), self.is_terminal)
        self.ends: list[End] = []
        self.requests: list[tuple[int, float]] = []  # to stop: signals, and when they came by time.monotonic()
        self.start_began, self.has_begun, self.restarts = time.time(), False, 0
        self.agent: Agent | None = None
        self.memory = Path(MEMORY)  # where ranks may have kept what they had not saved
        self.is_reforming = False  # the ranks have ended for other nodes' sake, and are to be started again
        self.is_spare = False  # all places were taken when this node came
        self.is_unfit = False  # it has failed twice, and leaves its place to a spare
        self.is_cut_off = False  # the rendezvous does not answer
        self.raised: BaseException | None = None  # what ended the agent, if it did not end by itself

    def run(self) -> int:
        """Start the ranks, pass signals on, and report how it ended."""
        for name in ("torch.distributed.elastic.multiprocessing.api", "torch.distributed.elastic.agent.server.api"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # what they report is reported here
        for number in (*stop_signals(), signal.SIGQUIT):
            signal.signal(number, self._take)
        with tempfile.TemporaryDirectory(prefix="dtrain-launch-", ignore_cleanup_errors=True) as folder:
            # Beside this thread, which stays free for signals: torch waits for other nodes in C++.
            thread = threading.Thread(target=self._run_agent, args=(Path(folder),), name="agent", daemon=True)
            thread.start()
            self._supervise(thread)
            self._end_left_behind()
            self.console.drain()
            self._close_run()
            status = self._status()
            if line := save_what_is_kept(self.folder, self.memory):
                self.console.say(f"dtrain launch: {line}")
            if status == FAILED:
                self.console.say(self._first_failure())
        sys.stdout.flush()
        sys.stderr.flush()
        if thread.is_alive():
            os._exit(status)  # it waits for other nodes; ranks that still run end with this process
        return status

    def _run_agent(self, folder: Path) -> None:
        """In a thread that outlives the ranks: the kernel would take its end for their parent's."""
        supervisor = Supervisor(
            self._listen, self._ended, self._reforms, self._is_leaving, self.shutdown_seconds,
            self._newest_checkpoint, self.console.say, self._clear,
        )  # fmt: skip
        kind = Agent if self.site.fewest is None else elastic_agent()
        try:
            self.agent = kind(self.site, folder, str(self.console.log_folder), supervisor)
            self.agent.run()
        except BaseException as error:
            self.raised = error
        if self.agent:
            with suppress(Exception):
                self.agent.finish(self.raised is None)

    def _is_leaving(self) -> bool:
        """Whether this node was asked to stop, or is to."""
        return bool(self.requests) or self.is_unfit

    def _newest_checkpoint(self) -> str:
        with suppress(OSError):
            return str((RunFolder(self.folder).checkpoints / "last").readlink())
        return ""

    def _end_left_behind(self) -> None:
        """End what ranks have started and left: each was the leader of a session, which outlives it."""
        sessions = set(self.agent.processes.values()) if self.agent else set()
        left = []
        for process in psutil.process_iter():
            with suppress(OSError):
                if os.getsid(process.pid) in sessions and process.pid not in sessions:
                    left.append(process)
        end_processes(left)

    def shutdown_seconds(self) -> float:
        """How long ranks may take to save and end: by the last save's time, where that is known."""
        facts = read_run(self.folder)
        last, mirror = facts.get("save_seconds"), float(facts.get("mirror_seconds") or 0)
        return mirror + (UNTIMED_SAVE_SECONDS if last is None else SHUTDOWN_SECONDS + SHUTDOWN_SAVES * float(last))

    def _listen(self, launch: Launch, local_rank: int, rank: int) -> None:
        """Rank 0 keeps a terminal, with its live bar, for itself; all else goes through pipes."""
        self.start_began, self.has_begun, self.ends, self.is_reforming = time.time(), False, [], False
        if not (rank == 0 and self.is_terminal):
            mark = launch.mark(local_rank) if self.waits_for_first_step else None
            self.console.listen(launch.pipe(local_rank), rank, mark)

    def _take(self, number: int, _frame: object) -> None:
        self.requests.append((signal.SIGTERM if number == signal.SIGQUIT else number, time.monotonic()))

    def _second_interrupt(self) -> float | None:
        """When the second Ctrl-C came, if it did; a terminal may deliver the first one several times."""
        times = [at for number, at in self.requests if number == signal.SIGINT]
        return next((at for at in times[1:] if at > times[0] + REPEAT_SECONDS), None)

    def _supervise(self, thread: threading.Thread) -> None:
        """Wait for the agent; each request to stop is passed on to every rank, also to those that start later."""
        delivered: dict[int, int] = {}  # process -> how many of the requests it was sent
        while thread.is_alive():
            thread.join(0.05)
            if self._is_cut_off():
                return
            if self.site.spares and not self.is_spare and self.agent and self.agent.is_spare:
                self.is_spare = True
                self.console.say(
                    f"dtrain launch: {self.site.nodes} node(s) are at work; {node_name()} is a spare, and ready"
                )
            if not self.requests:
                continue
            processes = [*self.agent.processes.values()] if self.agent else []
            for process in processes:
                for number, _ in self.requests[delivered.get(process, 0) :]:
                    _send(process, number)
                delivered[process] = len(self.requests)
            if self._is_overdue():
                for process in processes:
                    _send(process, signal.SIGKILL)
                thread.join(KILL_SECONDS)
                return
            if not processes:
                return  # it waits for other nodes: nothing is to be saved

    def _is_cut_off(self) -> bool:
        """Whether no other node can be reached: they take this one for lost, and its ranks must not live on."""
        asked_at = self.agent.asked_at if self.agent else None
        if asked_at is None or time.monotonic() < asked_at + CUT_OFF_SECONDS:
            return False
        assert self.agent is not None
        self.is_cut_off = True
        for process in self.agent.processes.values():
            _send(process, signal.SIGKILL)
        return True

    def _is_overdue(self) -> bool:
        """Whether ranks that were asked to stop have had their time."""
        if interrupted := self._second_interrupt():
            return time.monotonic() > interrupted + KILL_SECONDS
        limit = self.shutdown_seconds()
        if time.monotonic() <= self.requests[0][1] + limit:
            return False
        self.console.say(f"dtrain launch: ranks had not ended {limit:.0f} s after they were asked to: killed")
        return True

    def _clear(self) -> None:
        """The ranks have ended, and others are about to start."""
        self._end_left_behind()
        self.console.drain()

    def _reforms(self, ends: list[End], why: str) -> None:
        """All ranks here are over, or about to be, for other nodes' sake; the agent starts them again."""
        self.ends, self.is_reforming = ends, True
        self.console.say(f"dtrain launch: {why}; the nodes that are there continue from the last checkpoint")

    def _ended(self, ends: list[End], has_begun: bool, can_restart: int) -> bool:
        """All ranks here are over: whether the agent may start them again, if it would (as restart number ...)."""
        self.ends, self.has_begun = ends, has_begun
        self._note_failed_node()
        self._end_left_behind()
        is_final = any(end.is_reported and end.status in (WRONG_CONFIG, STOPPED_EARLY, INTERRUPTED) for end in ends)
        if self.site.spares and not self.site.is_host and node_name() in bad_nodes(self.folder):
            self.is_unfit = True
            self.console.say(f"dtrain launch: {node_name()} has failed twice; a spare takes its place")
            return False
        if not can_restart or not has_begun or self.requests or is_final:
            return False
        self.console.drain()
        self.restarts = max(self.restarts + 1, int(can_restart))
        again = f"restart {self.restarts} of {self.site.max_restarts}, from the last checkpoint"
        self.console.say(f"{self._first_failure()}\ndtrain launch: {again}")
        self.ends, self.has_begun = [], False  # of the start to come
        return True

    def _note_failed_node(self) -> None:
        """Of several nodes note this one, where a rank of it was killed or its GPU failed: the second time it is bad.

        What the training's own code raises is not the node's fault, nor are ranks that lost others.
        """
        if self.site.nodes + self.site.spares == 1 or self.requests:
            return
        card = read_json(RunFolder(self.folder).failure)
        own = {end.rank for end in self.ends}
        is_hardware = card.get("time", 0.0) >= self.start_began and card.get("rank") in own
        if is_hardware and HARDWARE.search(str(card.get("message"))):
            note_failed_node(self.folder, node_name(), f"rank {card['rank']}: {card['message']}"[:300])
        elif killed := [end for end in self.ends if end.status < 0 and end.status != -signal.SIGTERM]:
            note_failed_node(self.folder, node_name(), f"rank {killed[0].rank} {_how(killed[0])}")

    def _close_run(self) -> None:
        """Record the death of a rank 0 of this node in the run folder, where no sender does: MLflow may be missing."""
        facts = read_run(self.folder)
        main = next((end for end in self.ends if end.rank == 0), None)
        is_ours = main is not None and facts.get("attempt_started", 0.0) >= self.start_began
        if is_ours and facts.get("state") == "RUNNING" and not lives(facts):
            status = ENDINGS.get(main.status, "FAILED") if main and main.is_reported else ""
            known = {"status": status, "reason": "the run's end could not be written to the disk"} if status else None
            with suppress(OSError):
                close_run_of(self.folder, facts["pid"], known)

    def _status(self) -> int:
        """The exit status of this node's ranks: of the first line that holds, else the highest of theirs."""
        statuses = {FAILED if not end.is_reported and end.status == DONE else end.status for end in self.ends}
        is_saved = any(end.rank == 0 and end.is_reported and end.status == STOPPED_EARLY for end in self.ends)
        is_interrupted = bool(self.requests) and self.requests[0][0] == signal.SIGINT
        is_stopped_at_start = bool(self.requests) and not self.has_begun and statuses != {DONE}  # nothing is lost
        if self.is_reforming or not self.ends:
            return self._status_without_ranks(is_interrupted)
        table = (
            (self._second_interrupt() is not None, INTERRUPTED),
            (WRONG_CONFIG in statuses, WRONG_CONFIG),
            (is_saved, STOPPED_EARLY),
            (is_stopped_at_start, INTERRUPTED if is_interrupted else STOPPED_EARLY),
            (not statuses <= {DONE, STOPPED_EARLY, INTERRUPTED}, FAILED),
        )
        return next((status for holds, status in table if holds), max(statuses, default=FAILED))

    def _status_without_ranks(self, is_interrupted: bool) -> int:
        """Of a node that waited for others when it, or the job, came to its end."""
        if self.requests:
            return INTERRUPTED if is_interrupted else STOPPED_EARLY
        return FAILED if self.is_cut_off or self.agent is None else self.agent.ended_with()

    def _card(self) -> dict[str, Any]:
        """What rank 0 has left of a failure; nothing of another start, or of another machine's disk."""
        card = read_json(RunFolder(self.folder).failure)
        return card if card.get("time", 0.0) >= self.start_began else {}

    def _first_failure(self) -> str:
        """Which rank failed first, how, and where its output is; or why there was none, or not again."""
        if self.is_cut_off:
            text = f"dtrain launch: the rendezvous at {self.site.endpoint} has not answered for {CUT_OFF_SECONDS:.0f} s"
            return f"{text}: this node is cut off, and its ranks are killed"
        card = self._card()
        is_of_others = self.is_reforming and (not card or "silent_ranks" in card)
        if not self.ends or (self.raised and is_of_others):
            kind = type(self.raised).__name__
            text = NO_RENDEZVOUS.get(kind, "{kind}: {raised}")
            text = text.format(
                kind=kind, raised=self.raised, nodes_text=self.site.nodes_text, endpoint=self.site.endpoint
            )
            return f"dtrain launch: {one_line(text)}"
        if silent := card.get("silent_ranks"):
            rank, error = silent[0], ""
        elif card:
            rank, error = card["rank"], f": {in_one_line(card['error'], card['message'])}"
            error += f" at {card['where']}" if card.get("where") else ""
        else:
            rank, error = min(self.ends, key=_likelihood).rank, ""
        facts = [_how(end) for end in self.ends if end.rank == rank]
        if facts and (log := self.console.log_folder / f"rank-{rank}.log").exists():  # none of rank 0 on a terminal
            facts.append(f"its output: {log}")
        details = f" ({'; '.join(facts)})" if facts else ""
        return f"dtrain launch: rank {rank} failed first{error}{details}"


def elastic_agent() -> type[Agent]:
    """The agent of a job whose nodes come and go; imported for such a job only."""
    from dtrain.launch.elastic import ElasticAgent

    return ElasticAgent


def _likelihood(end: End) -> tuple[int, float]:
    """The likelier cause first: a rank that loses another one raises, and has status 1; the rest was asked to stop."""
    asked = dict.fromkeys((-signal.SIGTERM, STOPPED_EARLY, INTERRUPTED), 4)
    orders = {FAILED: 3, **asked, DONE: 5 if end.is_reported else 1}
    return orders.get(end.status, 0 if end.status < 0 else 2), end.reported_at


def _how(end: End) -> str:
    if end.status < 0:
        return f"killed by {signal.Signals(-end.status).name}"
    return f"exit status {end.status}" + ("" if end.is_reported else ", without reporting an error")


def _send(process: int, number: int) -> None:
    """A signal to a rank, if it still runs: its number may be another process's by now."""
    with suppress(psutil.Error, ProcessLookupError):
        if psutil.Process(process).ppid() == os.getpid():
            os.kill(process, number)
