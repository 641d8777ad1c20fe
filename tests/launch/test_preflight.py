"""`dtrain doctor --preflight` on real ranks with real faults: who is slow, broken, silent or different is named."""

import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch.distributed as dist
from conftest import Result, Running
from whole_runs import Place, forked_from, worlds_of

from dtrain.distributed.environment import expand_nodes, name_of_node
from dtrain.launch import node_checks
from dtrain.launch.preflight import partners
from dtrain.launch.preflight_verdict import Notes, judge, text_of

CLOCK = "import time; true_time = time.time; time.time = lambda: true_time() + 90\n"
ECC = """#!/bin/sh
case "$1" in
    *uncorrected*) echo "0, 3"; echo "1, 0" ;;
    *pending*) echo "0, No"; echo "1, Yes" ;;
    *thermal*) echo "0, Active"; echo "1, Not Active" ;;
    *remapped_rows.failure*) echo "Field is not a valid field to query." >&2; exit 2 ;;
    --query-gpu=index) echo 0; echo 1 ;;
    *) echo "0, [N/A]" ;;
esac
"""
XID = """#!/bin/sh
echo "[    0.100000] NVRM: Xid (PCI:0000:3b:00): 31, pid=7, name=python, MMU fault"
echo "[    0.200000] NVRM: Xid (PCI:0000:5e:00): 79, GPU has fallen off the bus."
"""
FREEZE = "#!/bin/sh\nkill -STOP $PPID\n"


def program(folder: Path, **texts: str) -> str:
    """A PATH on which these programs come first."""
    folder.mkdir()
    for name, text in texts.items():
        path = folder / name.replace("_", "-")
        path.write_text(text)
        path.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


class Job:
    """Ranks as srun starts them, on nodes that are all this machine."""

    def __init__(self, place: Place, folder: Path, nodes: int, ranks: int, seconds: int) -> None:
        self.place, self.folder, self.nodes, self.ranks, self.seconds = place, folder, nodes, ranks, seconds
        self.world = {key: value for key, value in worlds_of(1)[0].items() if key.startswith("MASTER_")}

    def start(self, rank: int, *words: str, env: Mapping[str, str] | None = None) -> Running:
        path = [*filter(None, [(env or {}).get("PYTHONPATH"), os.environ.get("PYTHONPATH")])]
        node = rank // self.ranks
        step = {
            "SLURM_STEP_NUM_TASKS": str(self.nodes * self.ranks), "SLURM_PROCID": str(rank),
            "SLURM_STEP_TASKS_PER_NODE": f"{self.ranks}(x{self.nodes})", "SLURM_LOCALID": str(rank % self.ranks),
            "SLURM_NODEID": str(node), "SLURMD_NODENAME": f"gpu{node}",
            "SLURM_STEP_NODELIST": f"gpu[0-{self.nodes - 1}]",
        }  # fmt: skip
        full = {**self.place.env, **self.world, **step, **(env or {}), "PYTHONPATH": os.pathsep.join(path)}
        files = self.folder / f"output-{rank}"
        files.mkdir()
        command = ["python", "-m", "dtrain", "doctor", *words, "--preflight", "--within", str(self.seconds)]
        return Running(command, self.folder, full, files, self.place.tagged, forked_from())


def texts(report: Mapping[str, Any], node: str) -> list[str]:
    (found,) = [one for one in report["nodes"] if one["node"] == node]
    return [f"{each['level']} {each['text']}" for each in found["findings"]]


class Ended(NamedTuple):
    """What ranks have printed, and where they were."""

    results: list[Result]
    folder: Path


@pytest.fixture(scope="module")
def ended(place: Place, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """Four jobs at once, since some of them mostly wait."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("sound", "faulty", "headless", "alone")}
    started = {
        "sound": _sound(place, folders["sound"]),
        "faulty": _faulty(place, folders["faulty"]),
        "headless": _headless(place, folders["headless"]),
        "alone": [Job(place, folders["alone"], nodes=2, ranks=1, seconds=10).start(1)],
    }
    stopped = started["faulty"].pop()
    results = {name: [rank.result(300) for rank in ranks] for name, ranks in started.items()}
    os.kill(stopped.pid, 9)
    return {name: Ended(results[name], folders[name]) for name in started}


def _sound(place: Place, folder: Path) -> list[Running]:
    job = Job(place, folder, nodes=2, ranks=2, seconds=200)
    return [job.start(rank, "--json", "--slow-below", "0") for rank in range(4)]


def _faulty(place: Place, folder: Path) -> list[Running]:
    """Of five nodes one is sound; one has another package, another file and a wrong clock, one memory errors, one
    freezes while it is looked at, one never comes."""
    job = Job(place, folder, nodes=5, ranks=1, seconds=120)
    own, other = folder / "own", folder / "other"
    for name in ("own/x", "other/numpy-1.0.dist-info", "other/only_here-2.0.dist-info"):
        (folder / name).mkdir(parents=True)
    for value, place_of in enumerate((own, other)):
        (place_of / "net.py").write_text(f"VALUE = {value}\n")
    (other / "sitecustomize.py").write_text(CLOCK)
    config = folder / "config.yaml"
    config.write_text("modules: [net]\n")
    paths = [os.environ["PATH"]] * 2
    paths += [program(folder / "broken", nvidia_smi=ECC, dmesg=XID), program(folder / "frozen", nvidia_smi=FREEZE)]
    words = (str(config), "--json", "--slow-below", "0", "--note-bad-nodes")
    return [
        job.start(rank, *words, env={"PATH": path, "PYTHONPATH": str(other if rank == 1 else own)})
        for rank, path in enumerate(paths)
    ]


def _headless(place: Place, folder: Path) -> list[Running]:
    """Rank 0 never comes; the store is that of torchrun's agent."""
    job = Job(place, folder, nodes=3, ranks=1, seconds=60)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    STORES.append(store)
    job.world["MASTER_PORT"] = str(store.port)
    return [job.start(rank, "--slow-below", "0", env={"TORCHELASTIC_USE_AGENT_STORE": "True"}) for rank in (1, 2)]


STORES: list[Any] = []  # as long as their jobs


@pytest.mark.slow
def test_sound_nodes_are_measured_and_nothing_is_left(ended: dict[str, Ended]) -> None:
    results, folder = ended["sound"]
    assert [result.rc for result in results] == [0] * 4, "".join(result.text for result in results)
    report = json.loads(results[0].stdout)
    assert (report["ok"], report["bad"]) == (True, [])
    assert [(node["node"], node["ranks"]) for node in report["nodes"]] == [("gpu0", [0, 1]), ("gpu1", [2, 3])]
    for node in report["nodes"]:
        assert set(node["figures"]) == {"compute", "memory", "in node", "network", "written", "read", "clock"}
        assert min(value for key, value in node["figures"].items() if key != "clock") > 0
    assert [result.stdout for result in results[1:]] == [""] * 3
    assert {path.name for path in folder.iterdir()} == {f"output-{rank}" for rank in range(4)}


@pytest.mark.slow
def test_each_fault_is_named_with_its_node(ended: dict[str, Ended]) -> None:
    results, folder = ended["faulty"]
    assert [result.rc for result in results] == [1] * 3, "".join(result.text for result in results)
    report = json.loads(results[0].stdout)
    assert {"gpu1", "gpu2", "gpu3", "gpu4"} <= set(report["bad"]) and not report["ok"]
    different = "\n".join(texts(report, "gpu1"))
    assert "bad rank 1: other packages than the rest: numpy 1.0 (the others " in different
    assert "only-here 2.0 (the others have none)" in different
    assert "bad rank 1: other code than the rest: net.py" in different
    assert "bad clock +" in different
    found = "\n".join(texts(report, "gpu2"))
    assert "bad rank 2: GPU 0: uncorrected ECC errors since the driver was loaded (3)" in found
    assert "bad rank 2: GPU 1: a memory row waits to be remapped: reset the GPU" in found
    assert "warn rank 2: GPU 0: too hot" in found and "Xid 79 (GPU has fallen off the bus)" in found
    assert "Xid 31" not in found
    assert any("rank 3 came, but did not finish its own checks" in text for text in texts(report, "gpu3"))
    assert texts(report, "gpu4") == ["bad rank 4 did not come within 54 s"]
    note = (folder / "runs" / "config" / "bad-nodes").read_text()
    assert all(f"\n{node}  " in note for node in ("gpu1", "gpu2", "gpu3", "gpu4"))
    assert "preflight: rank 4 did not come within 54 s" in note


@pytest.mark.slow
def test_another_rank_judges_where_rank_0_does_not_come(ended: dict[str, Ended]) -> None:
    """torchrun's agent holds the store; without it, as under srun, each rank says that nobody is there."""
    results = ended["headless"].results
    assert [result.rc for result in results] == [1, 1]
    (text,) = [result.stdout for result in results if result.stdout]
    assert "bad   gpu0  rank 0 did not come within 27 s" in text and "\nbad: gpu0" in text, text
    (silent,) = ended["alone"].results
    assert (silent.rc, silent.stdout) == (1, "")
    # On a busy machine the first attempt to connect takes all of the time.
    late = r"rank 1: (rank 0 did not come within 4 s to 127|not done within 10 s: rank 0's node \(127.0.0.1:\d+\))"
    assert re.search(late, silent.stderr), silent.stderr


QUOTA = Path("/sys/fs/cgroup/cpu")


@pytest.mark.soak
@pytest.mark.slow
def test_a_rank_with_little_of_a_processor_is_named(place: Place, tmp_path: Path) -> None:
    group = QUOTA / f"dtrain-{os.getpid()}"
    try:
        group.mkdir()
        (group / "cpu.cfs_quota_us").write_text("4000")
    except OSError as error:
        pytest.skip(f"SKIPPED, NOT TESTED HERE: a slow processor, by cgroups: {error}")
    try:
        job = Job(place, tmp_path, nodes=4, ranks=1, seconds=200)
        ranks = [job.start(rank, "--json", "--slow-below", "0.9") for rank in range(4)]
        (group / "cgroup.procs").write_text(str(ranks[2].pid))
        report = json.loads(next(rank.result(300) for rank in ranks).stdout)
    finally:
        for _ in range(100):
            try:
                group.rmdir()
                break
            except OSError:
                time.sleep(0.1)
    assert any("rank 2: compute" in text and "of the median's" in text for text in texts(report, "gpu2")), report


# What notes say


def notes(world: int, ranks_of_node: int = 1, **changes: Any) -> Notes:
    """Of equal ranks."""
    figures = {"compute": 10.0, "memory": 20.0}
    alone = {
        rank: {"figures": dict(figures), "findings": [], "device": "H200", "packages": "p"} for rank in range(world)
    }
    here = {
        rank: {"node": f"n{rank // ranks_of_node}", "number": rank // ranks_of_node, "local_world_size": ranks_of_node}
        for rank in range(world)
    }
    together = {rank: {"findings": [], "failed": {}, "network": 5.0} for rank in range(world)}
    return Notes(here, alone, together, {}, list(range(world)), world, 54.0)._replace(**changes)


def reasons(found: Notes, slow_below: float | None = None) -> dict[str, list[str]]:
    return {node.name: node.reasons for node in judge(found, slow_below, lambda digest: {}) if node.reasons}


def test_slow_is_what_is_below_a_part_of_the_median() -> None:
    found = notes(8, 2)
    assert reasons(found) == {}
    found.alone[2]["figures"]["compute"] = 6.9
    found.together[6]["network"] = found.together[7]["network"] = 0.5
    expected = {"n1": ["rank 2: compute 6.9 TFLOP/s, 0.69 of the median's 10"]}
    expected["n3"] = ["ranks 6, 7: network 0.5 GB/s, 0.10 of the median's 5"]
    assert reasons(found) == expected
    assert list(reasons(found, 0.5)) == ["n3"] and reasons(found, 0.05) == {}


def test_of_a_link_that_fails_the_one_is_named_that_fails_with_all() -> None:
    found = notes(4)
    for rank, partners_of in {1: (0, 2, 3), 0: (1,), 2: (1,), 3: (1,)}.items():
        found.together[rank]["failed"] = {f"network {other}": "timed out" for other in partners_of}
    del found.together[1]["network"]
    assert list(reasons(found)) == ["n1"] and len(reasons(found)["n1"]) == 3
    pair = notes(2)
    for rank in range(2):
        pair.together[rank] = {"findings": [], "failed": {f"network {1 - rank}": "reset"}}
    assert reasons(pair) == {
        f"n{rank}": [f"rank {rank}: no all-reduce with rank {1 - rank} on n{1 - rank}: reset"] for rank in range(2)
    }


def test_a_rank_that_stops_on_the_way_is_named_and_its_partners_are_not() -> None:
    found = notes(3)
    del found.together[1]
    found.together[0]["failed"] = {"network 1": "timed out"}
    assert reasons(found) == {"n1": ["rank 1 stopped answering while the network was measured"]}


@pytest.mark.parametrize(("offset", "level"), [(0.9, None), (3.0, "warn"), (-70.0, "bad")])
def test_the_clock_of_most_counts(offset: float, level: str | None) -> None:
    found = notes(4, clocks={"1": (0.01, 0.0), "2": (0.01, offset), "3": (0.01, 0.0)})
    levels = {node.name: [each for each, _ in node.findings] for node in judge(found, None, lambda digest: {})}
    assert levels == {"n0": [], "n1": [], "n2": [level] if level else [], "n3": []}
    wrong_asks = notes(4, clocks={str(rank): (0.01, -offset) for rank in (1, 2, 3)})  # the first node's clock is wrong
    levels = {node.name: [each for each, _ in node.findings] for node in judge(wrong_asks, None, lambda digest: {})}
    assert levels == {"n0": [level] if level else [], "n1": [], "n2": [], "n3": []}


def test_a_table_of_many_nodes_has_the_bad_ones() -> None:
    found = notes(300)
    found.alone[250]["figures"]["memory"] = 1.0
    text = text_of(judge(found, None, lambda digest: {}), 80.0, as_json=False)
    assert "n250" in text.splitlines()[2] and "(260 more)" in text and text.endswith("\nbad: n250")


@pytest.mark.parametrize("nodes", range(1, 12))
def test_partners_agree_and_change(nodes: int) -> None:
    rounds = partners(nodes, 6)
    assert len(rounds) == min(6, nodes + nodes % 2 - 1) * (nodes > 1)
    for each in rounds:
        assert all(other is None or (other != node and each[other] == node) for node, other in enumerate(each))
        assert each.count(None) == nodes % 2
    for node in range(nodes):
        met = [each[node] for each in rounds if each[node] is not None]
        assert len(met) == len(set(met))


def test_nodes_of_slurm_have_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert expand_nodes("n[03-05,9],x,gpu-[1-2]-a") == ["n03", "n04", "n05", "n9", "x", "gpu-1-a", "gpu-2-a"]
    monkeypatch.setenv("SLURM_STEP_NODELIST", "n[1-2]")
    assert [name_of_node(number) for number in range(3)] == ["n1", "n2", "node 2"]


def test_memory_and_products_that_are_wrong_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    cpu = torch.device("cpu")
    monkeypatch.setitem(node_checks.COMPUTE_SECONDS, "cpu", 0.01)
    assert node_checks.compute(cpu)[1] == [] and node_checks.memory(cpu)[2] == []
    true_product, true_fill, calls = torch.Tensor.__matmul__, torch.Tensor.fill_, []

    def product(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        found = true_product(one, other)
        calls.append(1)
        if len(calls) == 3:  # the first two are compared with one another
            found[5, 5] += 2
        return found

    def fill(tensor: torch.Tensor, value: int) -> torch.Tensor:
        true_fill(tensor, value)
        tensor[7] ^= 1 << 40
        return tensor

    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    monkeypatch.setattr(torch.Tensor, "fill_", fill)
    assert node_checks.compute(cpu)[1] == ["1 products of the same matrices came out different"]
    assert node_checks.memory(cpu)[2] == ["memory did not keep 4 of the words that were written"]


def test_a_folder_that_is_not_the_first_nodes_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(node_checks, "MARK_SECONDS", 0.0)
    assert "is not the disk of the first node" in node_checks.missed_mark(tmp_path / ".mark")
    (tmp_path / ".mark").touch()
    assert node_checks.missed_mark(tmp_path / ".mark") == ""
