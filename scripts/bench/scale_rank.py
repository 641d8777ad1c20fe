"""One rank of scale.py: joins the others, and times what all ranks do together. Run under torchrun."""

import json
import os
import pickle
import time
from array import array

import psutil
import torch

from dtrain.data import rng
from dtrain.distributed.process_group import set_up
from dtrain.distributed.vote import Vote
from dtrain.training.state import fingerprint

STEP_SECONDS = 0.002


def timed(action: object, times: int) -> float:
    """Milliseconds that a call takes, the best of some."""
    best = float("inf")
    for _ in range(times):
        began = time.perf_counter()
        action()  # type: ignore[operator]
        best = min(best, time.perf_counter() - began)
    return 1e3 * best


def main() -> None:
    """Print one JSON line on rank 0."""
    steps = int(os.environ["BENCH_STEPS"])
    ranks = set_up("cpu", {"timeout_seconds": 120})
    ranks.broadcast("here")
    joined = time.time() - float(os.environ["BENCH_STARTED"])
    vote, voting = Vote(ranks), 0.0
    for _ in range(steps):
        time.sleep(STEP_SECONDS)
        began = time.perf_counter()
        vote.cast(False, False)
        voting += time.perf_counter() - began
    vote.settle()
    module = torch.nn.Linear(64, 10)
    start_up = timed(lambda: ranks.broadcast({"folder": "run", "checkpoint": None}), 5)
    log = timed(lambda: ranks.sum_(torch.zeros(3, dtype=torch.float64)), 20)
    checkpoint = timed(lambda: ranks.gather((rng.get_state(), array("q", fingerprint(module).values()))), 5)
    memory = ranks.gather(psutil.Process().memory_info().rss / 1e6)
    if memory:
        figures = {
            "ranks": ranks.world_size,
            "joined_s": joined,
            "vote_us": 1e6 * voting / steps,
            "broadcast_ms": start_up,
            "log_ms": log,
            "checkpoint_ms": checkpoint,
            "generators_kb": len(pickle.dumps(rng.get_state())) / 1e3,
            "rank_mb": max(memory),
        }
        print(json.dumps(figures), flush=True)
    ranks.close()


if __name__ == "__main__":
    main()
