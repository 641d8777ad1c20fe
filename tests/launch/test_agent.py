"""What dtrain's agent takes from torchrun's, much of it private: a torch that lacks one of these is named here."""

import inspect
from pathlib import Path

import pytest
import torch
from torch.distributed.elastic.agent.server.api import WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import PContext
from torch.distributed.elastic.rendezvous import dynamic_rendezvous

from dtrain.launch.agent import Agent, Site


@pytest.mark.parametrize("name", ["_rendezvous", "_start_workers", "_monitor_workers"])
def test_torch_has_the_methods_that_are_overridden(name: str) -> None:
    base = getattr(LocalElasticAgent, name, None)
    assert base is not None, f"torch {torch.__version__} has no LocalElasticAgent.{name}, which Agent overrides"
    own = list(inspect.signature(getattr(Agent, name)).parameters)
    assert own == list(inspect.signature(base).parameters), f"torch {torch.__version__} calls {name} otherwise"


def test_torch_has_the_attributes_that_are_used(tmp_path: Path) -> None:
    site = Site(1, 1, "localhost:0", True, "127.0.0.1", "job", ("true",), max_restarts=2)
    agent = LocalElasticAgent(site.spec(), DefaultLogsSpecs(log_dir=str(tmp_path)))
    try:
        missing = [name for name in ("_worker_group", "_remaining_restarts", "_pcontext") if not hasattr(agent, name)]
        assert missing == [], f"torch {torch.__version__}'s LocalElasticAgent has no {', '.join(missing)}"
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
