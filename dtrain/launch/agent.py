"""torchrun's agent, which starts, watches and restarts the ranks of one node.

It overrides private methods of torch's class; tests/launch/test_agent.py names all that it takes from there.
"""

import json
import math
import os
import signal
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.distributed.elastic.agent.server.api import RunResult, Worker, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from dtrain.distributed.exit_status import DONE, FAILED
from dtrain.distributed.launched_rank import LAUNCH_VARIABLE, Launch

STORE_SECONDS = 300  # a node waits so long for the one that holds the rendezvous,
NODES_SECONDS = 900  # and so long for all others
NOTHING_TO_SAVE_SECONDS = 3.0  # ranks that have not begun have so long to end, as after a second Ctrl-C
CUT_OFF_SECONDS = 25.0  # without an answer of the rendezvous a node is cut off: the others take it for lost by then


class Site(NamedTuple):
    """This node's part of a job."""

    ranks_here: int
    nodes: int
    endpoint: str  # HOST:PORT of the rendezvous; of one node alone, localhost:0
    is_host: bool  # whether the rendezvous is held here
    address: str  # by which the other nodes reach this one
    job: str  # by which nodes of one job know one another
    command: tuple[str, ...]  # what a rank runs
    max_restarts: int
    fewest: int | None = None  # nodes with which it continues, where they may come and go
    spares: int = 0  # nodes that wait, to take the place of one that is lost
    join_every: float = 0.0  # seconds after which a node that comes joins, without waiting for a checkpoint

    @property
    def nodes_text(self) -> str:
        """How many nodes it is for."""
        return f"{self.nodes}" if self.fewest in (None, self.nodes) else f"{self.fewest} to {self.nodes}"

    def spec(self, rendezvous: RendezvousHandler | None = None) -> WorkerSpec:
        """The same for torchrun; its nodes meet in the rendezvous that is given, else in torch's own."""
        handler = rendezvous or self._met()
        return WorkerSpec(
            role="rank",
            local_world_size=self.ranks_here,
            rdzv_handler=handler,
            max_restarts=self.max_restarts,
            monitor_interval=0.1,
            entrypoint=self.command[0],
            args=tuple(word.replace("$", "$$") for word in self.command[1:]),  # torchrun fills in ${local_rank}
            local_addr=self.address,
        )

    def _met(self) -> RendezvousHandler:
        try:
            return self._rendezvous(self.is_host)
        except RendezvousConnectionError:
            if not self.is_host or self.nodes == 1:
                raise
            return self._rendezvous(is_host=False)  # another node of this very machine was quicker

    def _rendezvous(self, is_host: bool) -> RendezvousHandler:
        parameters = RendezvousParameters(
            "c10d", self.endpoint, self.job, self.nodes, self.nodes, self.address,
            is_host=str(is_host).lower(), read_timeout=STORE_SECONDS, join_timeout=NODES_SECONDS,
        )  # fmt: skip
        return get_rendezvous_handler(parameters)


class End(NamedTuple):
    """How a rank ended."""

    rank: int  # among all ranks
    status: int  # its exit status; negative: the signal that ended it
    reported_at: float  # when it reported its status, in unix seconds; infinite where it did not

    @property
    def is_reported(self) -> bool:
        """Whether the rank itself has reported the status: it came to its end."""
        return self.reported_at < math.inf


class Supervisor(NamedTuple):
    """What an agent tells its launcher, and asks it."""

    # Before each rank is started: its files, local rank and rank.
    listen: Callable[[Launch, int, int], None]
    # All ranks here are over: their ends, whether all had done a step, and whether they could be started again, or the
    # number of that restart; returns whether to do so.
    ended: Callable[[list[End], bool, int], bool]
    reforms: Callable[[list[End], str], None]  # the same where they will be, for other nodes' sake, and why
    is_asked: Callable[[], bool]  # whether this node was asked to stop
    shutdown_seconds: Callable[[], float]  # how long ranks may take to save and end
    newest_checkpoint: Callable[[], str]  # its name
    say: Callable[[str], None]
    clear: Callable[[], None]  # the ranks here have ended, and others are about to start


class Agent(LocalElasticAgent):
    """torchrun's agent, with what it lacks.

    Each start of the ranks gets a store of its own, on the first node's launcher: torch gives all of them the first
    one's, with what dead ranks have left on it, and a node that is replaced would wait forever for its address. And
    ranks are restarted only where that makes sense.

    `folder` is for files between launcher and ranks.
    """

    def __init__(self, site: Site, folder: Path, log_folder: str, supervisor: Supervisor) -> None:
        super().__init__(site.spec(self._met(site)), DefaultLogsSpecs(log_dir=str(folder)))
        self._folder, self._log_folder, self._supervisor = folder, log_folder, supervisor
        self._full_world_size = 0 if site.fewest is None else site.nodes * site.ranks_here
        self._patience: float | None = None  # seconds that ranks have to end, where others are gone
        self.asked_at: float | None = None  # when the rendezvous was asked what it has not answered yet
        self.processes: Mapping[int, int] = {}  # local rank -> process, of the ranks that were started
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"

    def _met(self, site: Site) -> RendezvousHandler | None:
        """The rendezvous, where it is another one than the site's own."""
        return None

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        self.processes = {}
        super()._rendezvous(worker_group)
        group: Any = worker_group  # typed as if nothing of it were known yet
        store, address = group.store, group.spec.local_addr
        if group.group_rank == 0:
            self._store_of_ranks = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
            starts = store.underlying_store.add(f"dtrain/{group.spec.rdzv_handler.get_run_id()}", 1)
            store.set("dtrain", json.dumps([address, self._store_of_ranks.port, starts]))
        group.master_addr, group.master_port, starts = json.loads(store.get("dtrain"))
        folder = self._folder / f"start-{starts}"
        folder.mkdir()
        self._launch = Launch(os.getpid(), str(folder), starts, self._log_folder, self._full_world_size)
        os.environ[LAUNCH_VARIABLE] = json.dumps(self._launch._asdict())

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        for worker in worker_group.workers:
            self._supervisor.listen(self._launch, worker.local_rank, worker.global_rank)
        self.processes = super()._start_workers(worker_group)
        assert self._pcontext is not None
        close, mark, self._patience = self._pcontext.close, self._launch.closing, None

        def mark_and_close(*arguments: Any, **options: Any) -> None:
            mark.touch()
            if (seconds := self.seconds_to_end(worker.local_rank for worker in worker_group.workers)) is not None:
                arguments, options = (signal.SIGTERM, seconds), {}
            close(*arguments, **options)

        self._pcontext.close = mark_and_close  # type: ignore[method-assign]
        return dict(self.processes)

    def seconds_to_end(self, local_ranks: Iterable[int]) -> float | None:
        """How long ranks may take that end because others did, before they are killed; None: as torchrun has it.

        Where this node was asked to stop and none has done a step, nothing is to be saved, and one that is still
        joining the process group hears no signal: it waits in C++ for those that are gone.
        """
        if self._patience is not None:
            return self._patience
        has_begun = any(self._launch.mark(local_rank).exists() for local_rank in local_ranks)
        return None if has_begun or not self._supervisor.is_asked() else NOTHING_TO_SAVE_SECONDS

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state in (WorkerState.SUCCEEDED, WorkerState.FAILED, WorkerState.UNHEALTHY):
            can_restart = self._remaining_restarts > 0 and result.state == WorkerState.FAILED
            ends = [self._end_of(worker, result) for worker in worker_group.workers]
            have_begun = all(self._launch.mark(worker.local_rank).exists() for worker in worker_group.workers)
            if not self._supervisor.ended(ends, have_begun, can_restart):
                self._remaining_restarts = 0
        return result

    @property
    def is_spare(self) -> bool:
        """Whether all places are taken, and this node waits for one."""
        return False

    def ended_with(self) -> int:
        """The exit status of a job that ended without this node."""
        return FAILED

    def finish(self, is_over: bool) -> None:
        """Close the rendezvous; `is_over` says that the agent ended by itself."""
        self._worker_group.spec.rdzv_handler.shutdown()

    def _end_of(self, worker: Worker, result: RunResult) -> End:
        failure = result.failures.get(worker.global_rank)
        status, reported_at, report = DONE, math.inf, self._launch.status_file(worker.local_rank)
        with suppress(OSError, ValueError):
            status, reported_at = int(report.read_text()), report.stat().st_mtime
        return End(worker.global_rank, failure.exitcode if failure else status, reported_at)
