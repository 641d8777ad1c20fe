"""`dtrain launch --spares`: a node that waits ready takes the place of a lost one; one that is not needed ends well."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from whole_runs import EXACT, Place, figures, same_training, worlds_of

from dtrain.launch.rendezvous import is_rendezvous
from dtrain.tracking.run_folder import read_run

pytestmark = [pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(900)]

# While a file is there no more samples come, after the first ones: the training cannot end before it is disturbed.
HELD = """
import os, time
from toy import Points

class Held(Points):
    def __init__(self, hold="", **more):
        super().__init__(**more)
        self.hold, self.loaded = hold, 0

    def __getitem__(self, index):
        self.loaded += 1
        while self.loaded > 12 and os.path.exists(self.hold):
            time.sleep(0.05)
        return super().__getitem__(index)
"""


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 400
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def steps(run: Path) -> int:
    try:
        return int(max(figures(run).get("train/loss", {0: 0.0})))
    except (OSError, ValueError):
        return 0


@pytest.mark.parametrize("number", range(5))
def test_a_spare_takes_the_place_of_a_lost_node(place: Place, number: int) -> None:
    """Four nodes for two places: one is killed with all that is its, and the job ends as if nothing had been."""
    place.write("held.py", HELD)
    hold = place.folder / f"spared-{number}.hold"
    hold.touch()
    changes = {**EXACT, "modules": ["toy", "held"], "loaders.name": "Held", "loaders.num_workers": 0}
    changes |= {"trainer.checkpoint_every_steps": 1, "loaders.hold": str(hold), "trainer.log_every_steps": 1}
    name = f"spared-{number}"
    file, run = place.config(name, **changes), place.path(name)
    endpoint = f"127.0.0.1:{worlds_of(1)[0]['MASTER_PORT']}"
    words = ("launch", file, "--nnodes", "2", "--spares", "2", "--nproc-per-node", "1", "--rdzv-endpoint", endpoint)
    first = place.start(*words)[0]
    until(lambda: is_rendezvous("127.0.0.1", int(endpoint.rpartition(":")[2])))  # held by the one that stays
    lost = place.start(*words)[0]
    until(lambda: "2 node(s), 2 rank(s)" in first.output().stderr)
    spares = [place.start(*words)[0] for _ in range(2)]
    for spare in spares:
        until(lambda: "is a spare, and ready" in spare.output().stderr)  # noqa: B023
    until(lambda: steps(run) >= 2)
    os.kill(lost.pid, signal.SIGKILL)
    hold.unlink()
    results = [each.result(400) for each in (first, *spares)]
    assert [result.rc for result in results] == [0, 0, 0], "".join(result.text for result in results)
    assert results[0].stderr.count("2 node(s), 2 rank(s)") == 2
    assert sorted(result.stderr.count("2 node(s), 2 rank(s)") for result in results[1:]) == [0, 1]
    assert (read_run(run)["state"], read_run(run)["world_size"]) == ("FINISHED", 2)
    whole = f"spared-{number}-whole"
    place.run(place.config(whole, **{**changes, "loaders.hold": ""}), ranks=2)
    same_training(run, place.path(whole))
    assert figures(run) == figures(place.path(whole))
