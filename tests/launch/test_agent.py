"""What dtrain's agent takes from torchrun's, much of it private: a torch that lacks one of these is named here."""

import ast
import inspect
import os
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.elastic.agent.server.api import WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import PContext
from torch.distributed.elastic.rendezvous import dynamic_rendezvous

from dtrain import launch
from dtrain.distributed.environment import node_name
from dtrain.distributed.launched_rank import Launch
from dtrain.launch.agent import NODES_SECONDS, NOTHING_TO_SAVE_SECONDS, Agent, Site
from dtrain.launch.elastic import LAST_CALL_SECONDS, ElasticAgent, Members

# What dtrain takes of torch's private names, by the class or module that has them.
PRIVATE = {
    "LocalElasticAgent": {
        *("_rendezvous", "_start_workers", "_monitor_workers", "_exit_barrier"),  # overridden
        *("_worker_group", "_remaining_restarts", "_pcontext"),
    },
    "DynamicRendezvousHandler": {
        *("_state_holder", "_stop_heartbeats", "_op_executor", "_get_deadline", "_settings", "_store", "_this_node"),
    },
    "dynamic_rendezvous": {"_RendezvousExitOp"},
    "SubprocessHandler": {"_popen"},
}
ALL_PRIVATE = {name for names in PRIVATE.values() for name in names}
PUBLIC_OF_NAMEDTUPLE = {"_replace", "_asdict", "_exit"}  # and os._exit


def parsed() -> list[ast.Module]:
    """The modules of dtrain that use torchrun's."""
    sources = [path.read_text() for path in Path(launch.__path__[0]).parent.rglob("*.py")]
    found = [ast.parse(source) for source in sources if "from torch.distributed.elastic" in source]
    assert len(found) >= 3
    return found


def own_names() -> set[str]:
    """Private names that dtrain's modules give to something of their own, or override."""
    own = set[str]()
    for node in (node for module in parsed() for node in ast.walk(module)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            own.add(node.attr)
    return {name for name in own if name.startswith("_") and not name.startswith("__")}


def test_every_private_name_of_torchs_agent_that_is_used_is_in_the_table() -> None:
    """So that a torch without one of them is told here, by the tests below, before a user is."""
    used = set[str]()
    for node in (node for module in parsed() for node in ast.walk(module)):
        if isinstance(node, ast.Attribute):
            used.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            used |= {name.name for name in node.names}
    used = {name for name in used if name.startswith("_") and not name.startswith("__")}
    assert used - own_names() - PUBLIC_OF_NAMEDTUPLE <= ALL_PRIVATE
    assert used | own_names() >= ALL_PRIVATE, "the table has what nobody uses"


@pytest.mark.parametrize(
    ("agent", "name"),
    [
        *((Agent, name) for name in ("_rendezvous", "_start_workers", "_monitor_workers")),
        *((ElasticAgent, name) for name in ("_rendezvous", "_monitor_workers", "_exit_barrier")),
    ],
)
def test_torch_has_the_methods_that_are_overridden(agent: type[Agent], name: str) -> None:
    base = getattr(LocalElasticAgent, name, None)
    assert base is not None, f"torch {torch.__version__} has no LocalElasticAgent.{name}, which dtrain overrides"
    own = list(inspect.signature(getattr(agent, name)).parameters)
    assert own == list(inspect.signature(base).parameters), f"torch {torch.__version__} calls {name} otherwise"


def test_torch_has_the_attributes_that_are_used(tmp_path: Path) -> None:
    site = Site(1, 1, "localhost:0", True, "127.0.0.1", "job", ("true",), max_restarts=2)
    agent = LocalElasticAgent(site.spec(), DefaultLogsSpecs(log_dir=str(tmp_path)))
    try:
        missing = [name for name in PRIVATE["LocalElasticAgent"] if not hasattr(agent, name)]
        assert missing == [], f"torch {torch.__version__}'s LocalElasticAgent has no {', '.join(missing)}"
        assert own_names() & {*dir(agent), *vars(agent)} <= ALL_PRIVATE, "torch has such a name, too"
        assert agent._remaining_restarts == 2
        group = agent._worker_group
        assert isinstance(group, WorkerGroup)
        names = ("spec", "workers", "store", "group_rank", "master_addr", "master_port")
        missing = [name for name in names if not hasattr(group, name)]
        assert missing == [], f"torch {torch.__version__}'s WorkerGroup has no {', '.join(missing)}"
        assert group.spec.rdzv_handler.get_run_id() == "job"
    finally:
        agent._worker_group.spec.rdzv_handler.shutdown()


def test_torch_ends_ranks_by_the_close_that_is_replaced() -> None:
    assert callable(getattr(PContext, "close", None)), f"torch {torch.__version__} has no PContext.close"
    for owner in (LocalElasticAgent._shutdown, inspect.getmodule(PContext)):
        text = inspect.getsource(owner)  # type: ignore[arg-type]
        assert ".close(" in text, f"torch {torch.__version__} ends ranks otherwise, in {owner}"


def test_torch_knows_the_states_and_the_variable_that_are_used() -> None:
    assert {"SUCCEEDED", "FAILED", "UNHEALTHY"} <= {state.name for state in WorkerState}
    variable = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
    text = inspect.getsource(dynamic_rendezvous)
    assert variable in text, f"torch {torch.__version__} shares the rendezvous' store whatever {variable} says"


def test_torch_has_what_nodes_that_come_and_go_need(tmp_path: Path) -> None:
    site = Site(1, 3, "localhost:0", True, "127.0.0.1", "job", ("true",), max_restarts=0, fewest=1, join_every=60.0)
    agent = LocalElasticAgent(site.spec(Members.meet(site, True)), DefaultLogsSpecs(log_dir=str(tmp_path)))
    members = agent._worker_group.spec.rdzv_handler
    try:
        assert isinstance(members, Members) and members.holds_store
        missing = [name for name in PRIVATE["DynamicRendezvousHandler"] if not hasattr(members, name)]
        assert missing == [], f"torch {torch.__version__}'s DynamicRendezvousHandler has no {', '.join(missing)}"
        missing = [name for name in PRIVATE["dynamic_rendezvous"] if not hasattr(dynamic_rendezvous, name)]
        assert missing == [], f"torch {torch.__version__}'s dynamic_rendezvous has no {', '.join(missing)}"
        assert own_names() & {*dir(members), *vars(members)} <= ALL_PRIVATE | {*vars(Members)}, "torch has such a name"
        assert members._settings.timeout.join.total_seconds() == NODES_SECONDS + 60
        assert members._settings.timeout.last_call.total_seconds() == LAST_CALL_SECONDS
        assert members._settings.keep_alive_interval * members._settings.keep_alive_max_attempt <= timedelta(seconds=20)
        assert members.next_rendezvous().world_size == 1
        assert members.look() == ([], 0)
        (node,) = members.nodes
        assert (node.addr, node.pid) == ("127.0.0.1", os.getpid())
        assert members._state_holder.state.wait_list == set()
        members.notes.set("some", "note")
        assert members.notes.check(["some"]) and not members.notes.check(["other"])
        members.leave()
        assert members.look() == ([f"{node_name()}: 127.0.0.1, process {os.getpid()}"], 0)
        assert not members.is_closed(), "the others may go on"
    finally:
        members.shutdown()


def test_torch_asks_for_restarts_and_for_nodes_that_wait_as_is_relied_on() -> None:
    text = inspect.getsource(LocalElasticAgent._invoke_run)
    for part in ("self._remaining_restarts > 0", "self._restart_workers", "rdzv_handler.num_nodes_waiting()"):
        assert part in text, f"torch {torch.__version__}'s loop has no {part}"


def test_torch_starts_ranks_by_the_call_that_ready_ranks_replace() -> None:
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    found = list(inspect.signature(SubprocessHandler._popen).parameters)
    assert found == ["self", "args", "env"], f"torch {torch.__version__} starts a rank's process otherwise: {found}"


def test_torch_knows_nodes_that_wait_as_spares() -> None:
    state = dynamic_rendezvous._RendezvousState()
    names = ("participants", "wait_list", "redundancy_list")
    missing = [name for name in names if not hasattr(state, name)]
    assert missing == [], f"torch {torch.__version__}'s rendezvous knows no {', '.join(missing)}"


def test_ranks_that_have_done_no_step_have_little_time_once_they_were_asked_to_stop(tmp_path: Path) -> None:
    """One that joins the process group hears no signal; torchrun would wait 30 s for it after a Ctrl-C."""
    agent, asked = object.__new__(Agent), [False]
    agent._patience, agent._launch = None, Launch(os.getpid(), str(tmp_path), 1, "", 0)
    agent._supervisor = SimpleNamespace(is_asked=lambda: asked[0])  # type: ignore[assignment]
    assert agent.seconds_to_end([0, 1]) is None
    asked[0] = True
    assert agent.seconds_to_end([0, 1]) == NOTHING_TO_SAVE_SECONDS < 30
    agent._launch.mark(1).touch()
    assert agent.seconds_to_end([0, 1]) is None
    agent._patience = 7.0  # of ranks whose others are gone
    assert agent.seconds_to_end([0, 1]) == 7.0
