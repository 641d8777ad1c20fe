"""The store by which ranks meet, opened without waiting for all of them: one that never comes can be named."""

import os
from datetime import timedelta
from typing import Any

from dtrain.distributed.environment import Environment, export_rank_variables


def open_store(found: Environment, seconds: float) -> Any:
    """The ranks' torch.distributed.Store, that of the launcher's agent or rank 0's; a process alone has its own.

    Waits so long for the store at most, and for no rank; then torch's DistStoreError or DistNetworkError is raised.
    """
    import torch.distributed as dist

    if found.world_size == 1:
        return dist.HashStore()  # type: ignore[attr-defined]
    export_rank_variables(found)
    holds_it = found.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
    return dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=holds_it,
        wait_for_workers=False,
        multi_tenant=holds_it,
        timeout=timedelta(seconds=seconds),
    )
