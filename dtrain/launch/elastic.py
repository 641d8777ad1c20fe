"""Nodes that come and go: torchrun's agent and rendezvous, which re-form without losing a step or eating a restart.

torchrun restarts everybody as soon as a node waits to join, does not see one that is cut off before a collective's
timeout, and counts each loss as a failure, on each agent for itself (pytorch/pytorch#108158). Here a node that comes
waits for a checkpoint, or for `--join-every`; then the ranks are asked to stop as by any signal, so that they save and
no step is lost. A node that is lost is missed in the rendezvous. Only what fails by itself counts, once for all nodes.

It reads private attributes of torch's classes; tests/launch/test_agent.py names them.
"""

import os
import signal
import time
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousParameters,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousTimeout,
    _RendezvousExitOp,
)

from dtrain.distributed.environment import node_name
from dtrain.distributed.exit_status import DONE, FAILED, INTERRUPTED, STOPPED_EARLY
from dtrain.launch.agent import NODES_SECONDS, STORE_SECONDS, Agent, End, Site, Supervisor
from dtrain.launch.ready_rank import ReadyRanks

LAST_CALL_SECONDS = 10  # so long nodes wait for more of them, once the fewest are there
ANSWER_SECONDS = 20  # so long the rendezvous may take for an answer
LOOK_SECONDS = 1.0  # between two questions to it
MISSED_SECONDS = 30.0  # so long it takes at most until a node that is gone is missed
PATIENCE_SECONDS = 10.0  # so long ranks have to end when others are gone
NOTE_SECONDS = 3.0  # so long after the ranks' stop the word of the node that leaves may come
LINGER_SECONDS = 3.0  # the rendezvous outlives the job for so long, so that all learn of its end


class Members(DynamicRendezvousHandler):
    """torchrun's rendezvous, without its way to restart everybody as soon as a node waits."""

    holds_store = False  # whether this process holds the store where the nodes meet
    nodes: frozenset[Any] = frozenset()  # those that the last round was formed of

    @classmethod
    def meet(cls, site: Site, is_host: bool) -> "Members":
        """Reach the rendezvous, or hold it."""
        assert site.fewest is not None
        try:
            parameters = RendezvousParameters(
                "c10d", site.endpoint, site.job, site.fewest, site.nodes, site.address,
                is_host=str(is_host).lower(), read_timeout=STORE_SECONDS,
            )  # fmt: skip
            backend, store = create_backend(parameters)
        except RendezvousConnectionError:
            if not is_host:
                raise
            return cls.meet(site, is_host=False)  # another node of this very machine was quicker
        store.set_timeout(timedelta(seconds=ANSWER_SECONDS))
        # A node that comes waits in the same call as one that misses others.
        timeout = RendezvousTimeout(
            join=timedelta(seconds=NODES_SECONDS + site.join_every), last_call=timedelta(seconds=LAST_CALL_SECONDS)
        )
        members = cls.from_backend(site.job, store, backend, site.fewest, site.nodes, site.address, timeout)
        members.holds_store = is_host
        return members

    @property
    def notes(self) -> Any:
        """A store for what nodes of this job leave for one another; it outlives each start of the ranks."""
        return dist.PrefixStore(f"dtrain/{self.get_run_id()}", self._store)  # type: ignore[attr-defined]

    def next_rendezvous(self) -> Any:
        """Form a round of the nodes that are there."""
        self.notes.set(_name_note(self._this_node), node_name())
        info = super().next_rendezvous()
        self.nodes = frozenset(self._state_holder.state.participants)
        return info

    def num_nodes_waiting(self) -> int:
        """None, as far as torch's agent is to know."""
        return 0

    def look(self) -> tuple[list[str], int]:
        """The nodes that are lost, and how many wait to join."""
        super().num_nodes_waiting()  # asks the store
        state = self._state_holder.state
        lost = sorted(self._text_of(node) for node in self.nodes - state.participants.keys())
        # A spare that was late to see all places taken may stand there, too.
        return lost, len(state.wait_list) if len(state.participants) < self._settings.max_nodes else 0

    def _text_of(self, node: Any) -> str:
        note = _name_note(node)
        name = self.notes.get(note).decode() if self.notes.check([note]) else "a node"
        return f"{name}: {node.addr}, process {node.pid}"

    @property
    def is_full(self) -> bool:
        """Whether other nodes have all places, so that this one is a spare."""
        state = self._state_holder.state
        return self._this_node not in state.participants and len(state.participants) == self._settings.max_nodes

    def leave(self) -> None:
        """Let the others form a round without this node, without waiting until it is missed."""
        self._stop_heartbeats()
        self._op_executor.run(_RendezvousExitOp(), self._get_deadline(self._settings.timeout.close))


class ElasticAgent(Agent):
    """An agent whose job continues with the nodes that are there.

    `_remaining_restarts` is what torch's loop asks after: 1 for a start to come, whatever its reason.
    """

    def __init__(self, site: Site, folder: Path, log_folder: str, supervisor: Supervisor) -> None:
        super().__init__(site, folder, log_folder, supervisor)
        self._site = site
        self._members = cast(Any, self._worker_group.spec.rdzv_handler)
        self._notes = self._members.notes
        self._look_at = 0.0  # when to ask the rendezvous again
        self._leaves = False  # while the others continue
        self._waited: tuple[float, str] | None = None  # since when a node waits, and for which checkpoint's successor
        self._forms_since: float | None = None  # when this node asked its ranks to stop, or saw that others had
        self._ready = ReadyRanks(site.ranks_here) if site.spares else None
        self._ends: list[End] = []  # of the last start, where it was the last one

    # ---------------------------------------------------------------------------------------------- starting ranks

    def _met(self, site: Site) -> Members:
        return Members.meet(site, site.is_host)

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        self._supervisor.clear()
        while True:
            try:
                if self._ready:
                    self._ready.start()
                super()._rendezvous(worker_group)
                break
            except RendezvousTimeoutError:
                if not self._members.is_full:
                    raise
            except dist.DistStoreError:  # a node was lost while the others waited for its word
                continue
        self._waited = self._forms_since = None
        group: Any = worker_group
        ranks = group.workers[0].world_size
        self._supervisor.say(f"dtrain launch: {group.group_world_size} node(s), {ranks} rank(s)")

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        start = partial(super()._start_workers, worker_group)
        return self._ready.take_over(start) if self._ready else start()

    @property
    def is_spare(self) -> bool:
        """Whether all places are taken, and this node waits for one."""
        return bool(self._members.is_full)

    # ---------------------------------------------------------------------------------------------- watching them

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super(Agent, self)._monitor_workers(worker_group)
        if result.state == WorkerState.HEALTHY:
            why = self._why_reform(worker_group)
            return self._reformed([], why) if why else result
        ends = [self._end_of(worker, result) for worker in worker_group.workers]
        if result.state == WorkerState.SUCCEEDED:
            if why := self._why_stopped(ends):
                return self._reformed(ends, why)
            return self._over(result, ends)
        if self._supervisor.is_asked() or result.state != WorkerState.FAILED:
            return self._over(result, ends)
        if not self._failed_here(ends):
            return self._reformed(ends, self._why_others_ended())
        return self._over(result, ends, self._restart_number())

    def _reformed(self, ends: list[End], why: str) -> RunResult:
        """Have torch's loop end what is left here, and start again with the nodes that are there."""
        self._patience, self._remaining_restarts = PATIENCE_SECONDS, 1
        self._supervisor.reforms(ends, why)
        return RunResult(state=WorkerState.FAILED)

    def _over(self, result: RunResult, ends: list[End], restart: int = 0) -> RunResult:
        """The ranks here have ended, by themselves or because one of them failed: start them again where allowed."""
        self._ends = ends
        is_again = self._supervisor.ended(ends, self._have_begun(), restart)  # which may have this node leave
        self._leaves = self._supervisor.is_asked() and not self._members.holds_store
        self._remaining_restarts = int(is_again)
        return result

    def _why_reform(self, worker_group: WorkerGroup) -> str:
        """Why ranks that run are to be started again, at once; '' where they are not."""
        is_asked, now = self._supervisor.is_asked(), time.monotonic()
        if now < self._look_at and not is_asked:
            return ""
        self._look_at = now + LOOK_SECONDS
        self.asked_at = now
        try:
            return self._why_reform_now(worker_group, is_asked)
        finally:
            self.asked_at = None

    def _why_reform_now(self, group: Any, is_asked: bool) -> str:
        lost, waiting = self._members.look()
        if is_asked:
            self._announce("a node leaves")
        if is_asked or self._is_forming():  # the ranks are about to save and end by themselves
            self._forms_since = self._forms_since or time.monotonic()
            is_overdue = time.monotonic() > self._forms_since + self._supervisor.shutdown_seconds()
            return "ranks that were asked to save and end have not done so" if is_overdue and not is_asked else ""
        if lost:
            return _lost_text(lost)
        if waiting and not self._have_begun():
            return "a node joins"
        if waiting and group.group_rank == 0 and self._may_join():
            self._announce("a node joins")
            self._launch.request.write_text("a node joins")
            for process in self.processes.values():
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGTERM)
        self._waited = self._waited if waiting else None
        return ""

    def _may_join(self) -> bool:
        """Whether a node that waits has waited for long enough: for a checkpoint, or for `--join-every`."""
        newest = self._supervisor.newest_checkpoint()
        self._waited = self._waited or (time.monotonic(), newest)
        since, before = self._waited
        return newest != before or time.monotonic() >= since + self._site.join_every

    # ---------------------------------------------------------------------------------------------- how they ended

    def _have_begun(self) -> bool:
        return all(self._launch.mark(worker.local_rank).exists() for worker in self._worker_group.workers)

    def _announce(self, why: str) -> None:
        """Tell all nodes why the ranks of this start end, so that each starts them again."""
        if not (why == "a node leaves" and self._members.holds_store):  # with that one the job ends
            self._notes.set(f"forming/{self._launch.starts}", why)

    def _is_forming(self) -> bool:
        return bool(self._notes.check([f"forming/{self._launch.starts}"]))

    def _why_stopped(self, ends: list[End]) -> str:
        """Why ranks that stopped early are to be started again; '' where they were asked here, or by nobody's word."""
        if self._supervisor.is_asked():
            self._announce("a node leaves")
            return ""
        if not any(end.is_reported and end.status == STOPPED_EARLY for end in ends):
            return ""
        deadline = time.monotonic() + NOTE_SECONDS
        while not self._is_forming():
            if time.monotonic() > deadline:
                return ""
            time.sleep(0.1)
        return str(self._notes.get(f"forming/{self._launch.starts}").decode())

    def _failed_here(self, ends: list[End]) -> bool:
        """Whether a rank of this node failed by itself, rather than for the loss of others."""
        files = zip(self._worker_group.workers, ends, strict=True)
        lost = {end.rank for worker, end in files if self._launch.lost(worker.local_rank).exists()}
        # NCCL aborts a rank whose peers are gone.
        soft = (DONE, STOPPED_EARLY, INTERRUPTED, -signal.SIGTERM, -signal.SIGABRT)
        return any(end.rank not in lost and end.status not in soft for end in ends) or not self._others_failed()

    def _others_failed(self) -> bool:
        """Whether a node is missed, leaves, or has said that a rank of its own failed; to miss one takes a while."""
        deadline = time.monotonic() + MISSED_SECONDS
        while time.monotonic() < deadline:
            if self._members.look()[0] or self._is_forming() or self._notes.check([f"failed/{self._launch.starts}"]):
                return True
            time.sleep(0.5)
        return False

    def _why_others_ended(self) -> str:
        if self._notes.check([f"failed/{self._launch.starts}"]):
            return "a rank of another node has failed"
        lost, _ = self._members.look()
        return _lost_text(lost) if lost else "ranks of another node are gone"

    def _restart_number(self) -> int:
        """Which restart of the job the failure of a rank asks for, by whichever node it is told first; 0: too many."""
        notes, restarts = self._notes, self._site.max_restarts
        is_first = notes.add(f"failed/{self._launch.starts}", 1) == 1
        number = notes.add("restarts", int(is_first))
        return number if number <= restarts else 0

    # ------------------------------------------------------------------------------------------------------ the end

    def _exit_barrier(self) -> None:
        if not self._leaves:
            super()._exit_barrier()

    def finish(self, is_over: bool) -> None:
        """Leave the rendezvous, or close it where the job is over."""
        if self._ready:
            self._ready.close()
        if self._leaves or not is_over or not self._ends:  # a spare has no word in how it ended
            self._members.leave()
        else:
            statuses = {end.status for end in self._ends}
            status = max(statuses, default=FAILED) if statuses <= {DONE, STOPPED_EARLY} else FAILED
            self._notes.set("ended", str(status))
            super().finish(is_over)
        if self._members.holds_store and self._site.nodes + self._site.spares > 1:
            time.sleep(LINGER_SECONDS)

    def ended_with(self) -> int:
        """How the job ended that this node had no part in by then."""
        with suppress(Exception):
            if self._notes.check(["ended"]):
                return int(self._notes.get("ended"))
        return FAILED


def _name_note(node: Any) -> str:
    return f"name/{node.addr}/{node.pid}"


def _lost_text(nodes: list[str]) -> str:
    what = "a node is" if len(nodes) == 1 else f"{len(nodes)} nodes are"
    return f"{what} lost ({'; '.join(nodes)})"
