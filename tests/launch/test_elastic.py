"""`dtrain launch --nnodes MIN:MAX`, for real: nodes are killed and come, and each step is that of an undisturbed run.

Each node is a launcher with one rank. The first one holds the rendezvous, and stays.
"""

import json
import os
import random
import re
import signal
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Running
from machines import Machines
from whole_runs import TORCHRUN, Place, close, figures, last, worlds_of

from dtrain.distributed.environment import node_name
from dtrain.launch import rendezvous
from dtrain.tracking.run_folder import read_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

# No dropout and no running statistics, which differ with the number of ranks; the loss is a mean over samples.
HELD: dict[str, Any] = {
    "loss.name": "Terms", "loaders.batch_size": 2,
    "optimizer": {"name": "AdamW", "lr": 0.02}, "lr_scheduler": {"name": "CosineAnnealingLR", "interval": "step"},
    "trainer.ema_decay": 0.8, "trainer.clip_grad_norm": 1.0, "trainer.log_every_steps": 1, "trainer.pictures": False,
    "trainer.checkpoint_every_steps": 3,
}  # fmt: skip
# A dataset that takes its time as long as a file is there, so that there is something to disturb.
PACED = """
import time
from pathlib import Path
from toy import Points

class Paced(Points):
    def __init__(self, hold="", **options):
        super().__init__(**options)
        self.hold = Path(hold)

    def __getitem__(self, index):
        if self.noise and self.hold.is_file():
            time.sleep(0.1)
        return super().__getitem__(index)
"""


def config(place: Place, name: str, hold: Path, **changes: Any) -> str:
    place.write("paced.py", PACED)
    train = {"name": "Paced", "size": 53, "noise": 0.1, "hold": str(hold)}
    return place.config(name, **{**HELD, "modules": ["toy", "paced"], "loaders.train": train, **changes})


def undisturbed(place: Place, ranks: int, **changes: Any) -> Path:
    name = f"undisturbed-on-{ranks}-{zlib.crc32(json.dumps(changes).encode())}"
    place.once(name, lambda: place.run(config(place, name, Path("none"), **changes), ranks=ranks).rc)
    return place.path(name)


class Nodes:
    """Launchers of one job on this machine, with one rank each."""

    def __init__(self, place: Place, name: str, nnodes: str, *words: str, endpoint: str = "", **changes: Any) -> None:
        self.place, self.run, self.hold = place, place.path(name), place.folder / f"{name}.hold"
        self.hold.touch()
        file = config(place, name, self.hold, **changes)
        endpoint = self.endpoint = endpoint or f"127.0.0.1:{worlds_of(1)[0]['MASTER_PORT']}"
        given = ("--nnodes", nnodes, "--nproc-per-node", "1", "--rdzv-endpoint", endpoint, *words)
        self.arguments = ("launch", file, *given)
        self.living: list[Running] = []
        self.ended: list[Running] = []

    def start(self, count: int = 1, **options: Any) -> None:
        for _ in range(count):
            self.living.append(self.place.start(*self.arguments, **options)[0])
            if len(self.living) == 1 and count > 1:  # that it is the one to hold the rendezvous
                self.until(lambda: rendezvous.is_rendezvous("127.0.0.1", int(self.endpoint.rpartition(":")[2])))

    def let_go(self) -> Running:
        """The newest one, which is not waited for any more."""
        self.ended.append(self.living.pop())
        return self.ended[-1]

    def kill(self, count: int = 1) -> None:
        """The newest ones, as if their power were cut: ranks die with their launcher."""
        for _ in range(count):
            lost = self.living.pop()
            os.kill(lost.pid, signal.SIGKILL)
            lost.process.wait(200)

    def formed(self) -> list[tuple[int, int]]:
        """Nodes and ranks of each start, as the first node tells."""
        said = re.findall(r"^dtrain launch: (\d+) node\(s\), (\d+) rank\(s\)$", self.living[0].output().stderr, re.M)
        return [(int(nodes), int(ranks)) for nodes, ranks in said]

    def steps(self) -> int:
        try:
            return max(figures(self.run).get("train/loss", {0: 0.0}))
        except (OSError, ValueError):
            return 0

    def until(self, condition: Callable[[], Any], seconds: float = 400) -> float:
        """Seconds until it holds."""
        begin = time.monotonic()
        while not condition():
            assert all(each.process.poll() is None for each in self.living), self.text()
            assert time.monotonic() < begin + seconds, self.text()
            time.sleep(0.02)
        return time.monotonic() - begin

    def until_formed(self, nodes: int, start: int) -> None:
        """A start of so many nodes, the given one or, where some come late, a later one, has done a step."""
        self.until(lambda: len(self.formed()) >= start and self.formed()[-1][0] == nodes)
        before, at = self.steps(), len(self.formed())
        self.until(lambda: self.steps() > before or len(self.formed()) > at)
        if len(self.formed()) > at:
            self.until_formed(nodes, at + 1)

    def text(self) -> str:
        return "".join(each.output().text for each in (*self.ended, *self.living))

    def results(self) -> list[int]:
        return [each.result(400).rc for each in self.living]


def as_undisturbed(nodes: Nodes, whole: Path) -> None:
    """The figures of every step, to 1e-5; the journal refuses none twice, and none is missing."""
    assert figures(nodes.run).keys() == figures(whole).keys()
    close(figures(nodes.run), figures(whole))
    ends = [last(run).state for run in (nodes.run, whole)]
    assert [each["step"] for each in ends] == [ends[0]["step"]] * 2 and ends[0]["position"] == ends[1]["position"]
    facts = read_run(nodes.run)
    assert (facts["state"], facts["exit_status"]) == ("FINISHED", 0), nodes.text()
    ids = {json.loads(line)["facts"]["id"] for line in (nodes.run / "metrics.jsonl").open() if '"start"' in line}
    assert len(ids) == 1, "one run through it all"
    said = "".join(each.output().stdout for each in nodes.living)
    assert "failed at step" not in said and "Traceback" not in said and "FAILED" not in said, nodes.text()
    assert "failed first" not in nodes.text()
    assert not (nodes.run / "failure.json").exists()


def test_a_node_is_lost_and_one_comes_and_the_steps_stay_the_same(place: Place) -> None:
    """2 -> 1 -> 2 nodes, without a restart that --max-restarts would allow."""
    nodes = Nodes(place, "comes-and-goes", "1:2", **{"trainer.max_epochs": 20})
    nodes.start(2)
    nodes.until(lambda: nodes.steps() >= 5)
    nodes.kill()
    nodes.until_formed(1, 2)
    nodes.start()
    nodes.until_formed(2, 3)
    nodes.hold.unlink()
    assert nodes.results() == [0, 0], nodes.text()
    as_undisturbed(nodes, undisturbed(place, 2, **{"trainer.max_epochs": 20}))
    said = nodes.living[0].output().stderr
    assert f"dtrain launch: a node is lost ({node_name()}: 127.0.0.1, process" in said, said
    assert "dtrain launch: a node joins; the nodes that are there continue from the last checkpoint" in said
    facts = read_run(nodes.run)
    assert (facts["batch_ranks"], facts["world_size"]) == (2, 2)


@pytest.mark.soak
@pytest.mark.parametrize("number", range(20))
def test_nodes_come_and_go_at_any_step(place: Place, number: int) -> None:
    """4 -> 2 -> 3 -> 4 nodes."""
    seed = random.randrange(1 << 30)
    print("seed", seed)
    chance = random.Random(seed)
    far = place.folder / f"far-{number}"  # of a start that is formed anew, nobody waits for the mirror's process
    nodes = Nodes(place, f"any-step-{number}", "1:4", **{"trainer.max_epochs": 40, "trainer.mirror_to": str(far)})
    nodes.start(4)

    def some_steps() -> None:
        steps = nodes.steps() + chance.randrange(1, 7)
        nodes.until(lambda: nodes.steps() >= steps)
        time.sleep(chance.uniform(0, 0.3))

    nodes.until_formed(4, 1)
    some_steps()
    nodes.kill(2)
    began, seconds = time.monotonic(), {}
    seconds["formed"] = nodes.until(lambda: nodes.formed()[-1][0] == 2)
    nodes.until_formed(2, 2)
    seconds["stepping"] = time.monotonic() - began
    some_steps()
    nodes.start()
    nodes.until_formed(3, 3)
    some_steps()
    nodes.start()
    nodes.until_formed(4, 4)
    some_steps()
    nodes.hold.unlink()
    assert nodes.results() == [0] * 4, nodes.text()
    print("from the loss of two nodes:", seconds, "starts:", nodes.formed(), "steps:", nodes.steps())
    as_undisturbed(nodes, undisturbed(place, 4, **{"trainer.max_epochs": 40}))
    assert to_resume_from(far) == to_resume_from(nodes.run)


def to_resume_from(folder: Path) -> dict[str, bytes]:
    """What a run or its mirror holds of a training: checkpoints, journal, status."""
    files = [*folder.glob("checkpoints/step-*/*"), folder / "metrics.jsonl", folder / "run.json"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.soak
@pytest.mark.parametrize("stays", [0, 1], ids=["with-rank-0", "without-rank-0"])
def test_a_machine_that_is_cut_off_is_left_behind_and_comes_back(place: Place, machines: Machines, stays: int) -> None:
    """The cable between two machines is cut: nobody sees an end of anything. Rank 0 is on the first one."""
    endpoint, name = f"10.77.0.{stays + 1}:29571", f"cut-{stays}"
    nodes = Nodes(place, name, "1:2", endpoint=endpoint, **{"trainer.max_epochs": 40})
    nodes.start(launcher=machines[stays])
    nodes.start(launcher=machines[1 - stays])
    nodes.until_formed(2, 1)
    nodes.until(lambda: nodes.steps() >= 5)
    lost = nodes.let_go()
    machines.connect(False)
    seconds = nodes.until(lambda: nodes.formed()[-1][0] == 1)
    result = lost.result(200)
    assert result.rc == 1, result.text
    assert f"the rendezvous at {endpoint} has not answered for 25 s: this node is cut off" in result.stderr, result.text
    nodes.until_formed(1, 2)
    machines.connect()
    nodes.start(launcher=machines[1 - stays])
    nodes.until_formed(2, 3)
    nodes.hold.unlink()
    assert nodes.results() == [0, 0], nodes.text()
    print("from the cut:", seconds, "starts:", nodes.formed())
    as_undisturbed(nodes, undisturbed(place, 2, **{"trainer.max_epochs": 40}))


@pytest.mark.soak
def test_torchrun_keeps_the_global_batch(place: Place) -> None:
    """2 -> 1 nodes under `torchrun --nnodes=1:2`, whose ranks start again by themselves."""
    changes = {"trainer.max_epochs": 40}
    run, hold = place.path("torchrun"), place.folder / "torchrun.hold"
    hold.touch()
    file = config(place, "torchrun", hold, **changes)
    port = worlds_of(1)[0]["MASTER_PORT"]
    launcher = [*TORCHRUN, "--nnodes=1:2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=elastic"]
    launcher += [f"--rdzv-endpoint=127.0.0.1:{port}", "--max-restarts=3"]

    def node() -> Running:
        return place.start("train", file, launcher=launcher)[0]

    def until(ranks: int, first: Running) -> None:
        """Steps are done by so many ranks."""
        done, begin = -1, time.monotonic()
        while time.monotonic() < begin + 400:
            assert first.process.poll() is None, first.output().text
            if read_run(run).get("world_size") == ranks and read_run(run).get("state") == "RUNNING":
                steps = max(figures(run).get("train/loss", {0: 0.0}))
                done = steps if done < 0 else done
                if steps > done + 2:
                    return
            else:
                done = -1
            time.sleep(0.1)
        pytest.fail(first.output().text)

    first, second = node(), node()
    until(2, first)
    for process in (psutil.Process(second.pid), *psutil.Process(second.pid).children(recursive=True)):
        process.kill()  # torchrun's ranks would outlive it
    second.process.wait(200)
    until(1, first)
    hold.unlink()
    assert first.result(400).rc == 0, first.output().text
    close(figures(run), figures(undisturbed(place, 2, **changes)))
    assert read_run(run)["batch_ranks"] == 2
