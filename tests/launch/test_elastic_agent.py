"""What an agent of nodes that come and go decides, with the rendezvous' store and ranks' files, but without ranks."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.elastic.agent.server.api import RunResult, Worker, WorkerState

from dtrain.distributed.launched_rank import Launch
from dtrain.launch import elastic
from dtrain.launch.agent import End, Site, Supervisor
from dtrain.launch.elastic import ElasticAgent
from dtrain.launch.launcher import NodeRun

SITE = Site(2, 4, "localhost:0", True, "127.0.0.1", "job", ("true",), max_restarts=2, fewest=1, join_every=50.0)
NEVER = float("inf")


class Node:
    """One agent, and what its launcher is told and asked."""

    def __init__(self, folder: Path, store: Any, holds_store: bool = False) -> None:
        folder.mkdir()
        self.said: list[str] = []
        self.asked, self.checkpoint, self.restarts = False, "step-1", []
        supervisor = Supervisor(
            listen=lambda *_: None, ended=self._ended, reforms=lambda ends, why: self.said.append(why),
            is_asked=lambda: self.asked, shutdown_seconds=lambda: 60.0, newest_checkpoint=lambda: self.checkpoint,
            say=self.said.append, clear=lambda: None,
        )  # fmt: skip
        self.lost: list[str] = []
        self.waiting = 0
        self.left = False
        members = SimpleNamespace(
            notes=store, look=lambda: (self.lost, self.waiting), holds_store=holds_store, leave=self._leave,
            shutdown=lambda: None,
        )  # fmt: skip
        agent: Any = ElasticAgent.__new__(ElasticAgent)
        workers = [Worker(number, number) for number in range(2)]
        spec = SimpleNamespace(rdzv_handler=members)
        agent._worker_group = SimpleNamespace(workers=workers, group_rank=0, spec=spec)
        agent._supervisor, agent._site, agent._members, agent._notes = supervisor, SITE, members, store
        agent._ready = None
        agent._leaves, agent._waited, agent._forms_since, agent._ends = False, None, None, []
        agent._look_at, agent.asked_at, agent._patience = 0.0, None, None
        agent.processes, agent._remaining_restarts = {}, 0
        agent._launch = self.launch = Launch(0, str(folder), 1, "")
        self.agent = agent

    def _leave(self) -> None:
        self.left = True

    def _ended(self, ends: list[End], has_begun: bool, restart: int) -> bool:
        self.restarts.append(restart)
        return bool(restart) and has_begun

    def begun(self) -> "Node":
        for number in range(2):
            self.launch.mark(number).touch()
        return self

    def look(self) -> str:
        self.agent._look_at = 0.0
        return self.agent._why_reform(self.agent._worker_group)

    def over(self, *statuses: int, state: WorkerState = WorkerState.FAILED, monkeypatch: pytest.MonkeyPatch) -> bool:
        """The ranks end so; whether the agent starts them again."""
        ends = iter([End(rank, status, 1.0 if status >= 0 else NEVER) for rank, status in enumerate(statuses)])
        base = ElasticAgent.__mro__[2]
        monkeypatch.setattr(base, "_monitor_workers", lambda self, group: RunResult(state=state))
        self.agent._end_of = lambda worker, result: next(ends)
        result = self.agent._monitor_workers(self.agent._worker_group)
        return result.state == WorkerState.FAILED and self.agent._remaining_restarts > 0


@pytest.fixture
def store() -> Any:
    return dist.HashStore()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(elastic, "MISSED_SECONDS", 0.2)
    monkeypatch.setattr(elastic, "NOTE_SECONDS", 0.2)
    yield


def test_a_failure_counts_once_for_all_nodes(tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes see a rank of theirs fail in the same start; --max-restarts 2 allows two such starts."""
    nodes = [Node(tmp_path / f"{number}", store).begun() for number in range(2)]
    for start, expected in ((1, 1), (2, 2), (3, 0)):
        for node in nodes:
            node.agent._launch = node.launch._replace(starts=start)
            assert node.over(-9, 75, monkeypatch=monkeypatch) is bool(expected)
            assert node.restarts[-1] == expected


@pytest.mark.parametrize("status", [1, -signal.SIGABRT], ids=["it saw others go", "NCCL aborted it"])
def test_ranks_that_lost_others_cost_no_restart(
    tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    for evidence in ("a node is missed", "another one's rank has failed", "another one leaves", ""):
        node = Node(tmp_path / f"because {evidence}", store := dist.HashStore()).begun()
        if status == 1:
            node.launch.lost(0).touch()
            node.launch.lost(1).touch()
        node.lost = ["10.0.0.7, process 1"] if "missed" in evidence else []
        if "failed" in evidence:
            store.add("failed/1", 1)
        if "leaves" in evidence:
            store.set("forming/1", "a node leaves")
        assert node.over(status, status, monkeypatch=monkeypatch)
        assert node.restarts == ([] if evidence else [1]), "without any evidence it is a failure as any other"


def test_a_node_waits_for_a_checkpoint_or_for_its_time(
    tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(elastic, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=lambda seconds: None))
    for reason in ("checkpoint", "time"):
        node = Node(tmp_path / reason, dist.HashStore()).begun()
        node.waiting = 1
        assert node.look() == "" and not node.launch.request.exists()
        clock[0] += 49.0
        assert node.look() == "" and not node.launch.request.exists()
        if reason == "checkpoint":
            node.checkpoint = "step-2"
        else:
            clock[0] += 1.0
        assert node.look() == "", "the ranks are asked to stop, and stop by themselves"
        assert node.launch.request.read_text() == "a node joins"
        node.lost = ["10.0.0.7, process 1"]  # one that has ended sooner
        assert node.look() == ""
        clock[0] += 59.0
        assert node.look() == ""
        clock[0] += 2.0
        assert node.look() == "ranks that were asked to save and end have not done so"


def test_before_the_first_step_a_node_joins_at_once(tmp_path: Path, store: Any) -> None:
    node = Node(tmp_path / "a", store)
    node.waiting = 1
    assert node.look() == "a node joins"


def test_a_node_that_leaves_lets_the_others_continue(
    tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves, stays = (Node(tmp_path / name, store).begun() for name in ("leaves", "stays"))
    leaves.asked = True
    assert leaves.look() == ""
    assert not leaves.over(75, 75, state=WorkerState.SUCCEEDED, monkeypatch=monkeypatch)
    leaves.agent.finish(is_over=True)
    assert leaves.left and not store.check(["ended"])
    assert stays.over(75, 75, state=WorkerState.SUCCEEDED, monkeypatch=monkeypatch)
    assert stays.said == ["a node leaves"] and stays.restarts == []


def test_a_time_limit_ends_all_nodes_and_so_does_the_node_with_the_rendezvous(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elastic, "LINGER_SECONDS", 0.0)
    for asked in (False, True):
        store = dist.HashStore()
        host, other = (Node(tmp_path / f"{name}-{asked}", store, name == "host").begun() for name in ("host", "other"))
        host.asked = asked
        host.look()
        for node in (host, other):
            assert not node.over(75, 75, state=WorkerState.SUCCEEDED, monkeypatch=monkeypatch)
        host.agent.finish(is_over=True)
        assert not host.left and other.agent.ended_with() == 75


def test_a_rank_learns_why_it_is_to_stop_and_how_many_ranks_there_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dtrain.distributed import launched_rank

    launch = Launch(**json.loads(json.dumps(Launch(1, str(tmp_path), 1, "", full_world_size=8)._asdict())))
    assert not launched_rank.leaves_to_launcher() and launched_rank.reason_to_stop() == ""
    monkeypatch.setattr(launched_rank, "_launch", launch)
    assert launched_rank.leaves_to_launcher() and launched_rank.full_world_size() == 8
    assert launched_rank.reason_to_stop() == ""
    launch.request.write_text("a node joins")
    assert launched_rank.reason_to_stop() == "a node joins"


def test_a_node_that_waited_learns_how_the_job_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for statuses, told in (((0, 0), 0), ((75, 75), 75), ((-9, 75), 1), ((1, 1), 1)):
        store = dist.HashStore()
        last, waits = (Node(tmp_path / f"{name}-{statuses}", store) for name in ("last", "waits"))
        assert waits.agent.ended_with() == 1, "nobody has said"
        state = WorkerState.FAILED if told == 1 else WorkerState.SUCCEEDED
        assert not last.over(*statuses, state=state, monkeypatch=monkeypatch), "not before the first step"
        last.agent.finish(is_over=True)
        assert waits.agent.ended_with() == told


def test_a_rendezvous_that_is_gone_is_told_in_words(tmp_path: Path) -> None:
    """Of a store whose process is killed, torch's own error is another one than of a store that was never there."""
    held = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    reached = dist.TCPStore("127.0.0.1", held.port, is_master=False, wait_for_workers=False)
    del held
    run = NodeRun(SITE._replace(endpoint="node1:29500"), tmp_path, None, is_new=True)
    try:
        reached.check(["note"])
    except dist.DistError as error:
        run.raised = error
    text = "the rendezvous at node1:29500 is gone, and the job with it; start it again on all nodes"
    assert run._first_failure() == f"dtrain launch: {text}"
    run.raised = dist.DistStoreError("wait timeout after 20000ms, keys: /dtrain/job/forming/1")
    text = "the rendezvous at node1:29500 has not answered in time; start the job again on all nodes"
    assert run._first_failure() == f"dtrain launch: {text}"
