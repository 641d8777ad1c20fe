"""Where a rank works: on made-up machines below a folder that stands for /sys, and on this one."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, RunCli

from dtrain.config.errors import ConfigError
from dtrain.distributed import interfaces
from dtrain.distributed.affinity import (
    Machine,
    Place,
    cpus_text,
    note_on,
    parse_cpus,
    places,
    raise_open_files,
    read_machine,
    take_place,
)
from dtrain.distributed.clock_speed import ClockSpeed, clock_speed, compared
from dtrain.distributed.environment import Environment

# Two sockets of 32 cores with two threads each, four GPUs on each: as a DGX numbers them.
GPUS = [f"0000:{bus}:00.0" for bus in ("1b", "43", "52", "61", "9d", "c3", "d1", "df")]
SIDES = {0: "0-31,64-95", 1: "32-63,96-127"}


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


@pytest.fixture
def two_sockets(tmp_path: Path) -> Path:
    for node, cpus in SIDES.items():
        write(tmp_path / f"devices/system/node/node{node}/cpulist", cpus)
    write(tmp_path / "devices/system/node/node2/cpulist", "")  # memory alone
    for cpu in range(128):
        siblings = f"{cpu % 64},{cpu % 64 + 64}"
        write(tmp_path / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", siblings)
    for number, gpu in enumerate(GPUS):
        write(tmp_path / f"bus/pci/devices/{gpu}/numa_node", str(number // 4))
        write(tmp_path / f"bus/pci/devices/{gpu}/local_cpulist", SIDES[number // 4])
    return tmp_path


def test_a_machine_is_read_as_linux_describes_it(two_sockets: Path) -> None:
    machine = read_machine(two_sockets, GPUS)
    assert set(machine.nodes) == {0, 1}
    assert machine.nodes[1] == {*range(32, 64), *range(96, 128)}
    assert list(machine.gpus.values()) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert machine.cores_in(set(machine.nodes[0])) == 32, "64 threads of 32 cores"
    write(two_sockets / f"bus/pci/devices/{GPUS[4]}/numa_node", "-1")  # some BIOSes; the CPUs tell
    assert read_machine(two_sockets, GPUS).gpus[GPUS[4]] == 1
    (two_sockets / f"bus/pci/devices/{GPUS[4]}/local_cpulist").write_text("0-127\n")
    assert read_machine(two_sockets, GPUS).gpus[GPUS[4]] == -1
    assert read_machine(two_sockets / "nothing", GPUS) == Machine({}, {}, dict.fromkeys(GPUS, -1))


def test_ranks_work_on_their_gpus_side(two_sockets: Path) -> None:
    machine, everything = read_machine(two_sockets, GPUS), set(range(128))
    found = places(machine, everything, GPUS)
    assert found == [Place(machine.nodes[side], side, 4, True) for side in (0, 0, 0, 0, 1, 1, 1, 1)]
    assert note_on(found) == (
        "of this node ranks 0-3 on CPUs 0-31,64-95 (NUMA node 0, the side of their GPUs), "
        "ranks 4-7 on CPUs 32-63,96-127 (NUMA node 1, the side of their GPUs); "
        "DTRAIN_AFFINITY=none leaves them where the system puts them"
    )
    only_own = places(machine, everything, [None, None, GPUS[2], *[None] * 5])  # --gpus-per-task=1
    assert only_own[2] == Place(machine.nodes[0], 0, 4, True), "the others are taken to be spread evenly"
    swapped = places(machine, everything, [GPUS[5], GPUS[1]])  # CUDA_VISIBLE_DEVICES=5,1
    assert [place and place.node for place in swapped] == [1, 0]


def test_a_job_that_has_a_part_of_the_machine_stays_in_it(two_sockets: Path) -> None:
    machine = read_machine(two_sockets, GPUS)
    found = places(machine, {*range(16), *range(32, 48)}, GPUS[:1] + GPUS[4:5])
    assert [place and place.cpus for place in found] == [frozenset(range(16)), frozenset(range(32, 48))]
    assert places(machine, set(range(16)), GPUS[:2]) == [None, None], "on one side alone there is nothing to choose"
    assert places(machine, {0, 32, 33, 34}, GPUS[:1] + GPUS[4:5])[0] is None, "one CPU for a rank and its workers"


def test_ranks_without_gpus_are_spread_over_the_nodes(two_sockets: Path) -> None:
    machine = read_machine(two_sockets)
    found = places(machine, set(range(128)), [None] * 4)
    assert [place and place.node for place in found] == [0, 0, 1, 1]
    assert "side" not in note_on(found)
    assert places(machine, set(range(128)), [None]) == [None], "a lone process may use both"


def test_lists_of_cpus() -> None:
    assert parse_cpus("0-3,8,10-11") == {0, 1, 2, 3, 8, 10, 11}
    assert parse_cpus("") == parse_cpus("all") == set()
    assert cpus_text({0, 1, 2, 3, 8, 10, 11}) == "0-3,8,10-11"


SHOW = """
import os, sys
from pathlib import Path
from dtrain.distributed import affinity
from dtrain.distributed.environment import environment
own = os.sched_getaffinity(0)
share, notes = affinity.take_place(environment(), [None] * 2, Path(sys.argv[1]))
if len(sys.argv) > 2:
    affinity._bind(affinity.Place(frozenset({0}), 0, 2, False), {*range(128)}, 2)
print(share, len(notes), sorted(os.sched_getaffinity(0)))
if not os.fork():
    affinity.free_worker()
    print(sorted(os.sched_getaffinity(0)), flush=True)
    os._exit(0)
os.wait()
"""


def shown(root: Path, *more: str, env: dict[str, str] | None = None, before: list[str] | None = None) -> str:
    world = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    command = [*(before or []), sys.executable, "-c", SHOW, str(root), *more]
    full = {**os.environ, **world, "MASTER_PORT": "1", **(env or {}), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=full, capture_output=True, text=True, timeout=200)
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="SKIPPED, NOT TESTED HERE: one CPU")
def test_workers_are_never_bound_to_a_ranks_one_core(tmp_path: Path) -> None:
    """On this very machine: the rank is bound, its forked worker is free again."""
    everything = sorted(os.sched_getaffinity(0))
    lines = shown(tmp_path, "bind").splitlines()
    assert lines[0].endswith("[0]") and lines[1] == str(everything)


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="SKIPPED, NOT TESTED HERE: one CPU")
def test_what_somebody_chose_for_a_rank_holds(tmp_path: Path) -> None:
    """A machine of two nodes, of which each has one CPU here: whoever was bound by taskset stays there."""
    for node in (0, 1):
        write(tmp_path / f"devices/system/node/node{node}/cpulist", str(node))
    bound = shown(tmp_path, before=["taskset", "-c", "1"])
    assert bound.splitlines() == ["1 0 [1]", "[1]"], "and all of what it has is its share of threads"
    wrong = shown(tmp_path, env={"DTRAIN_AFFINITY": "always"})
    assert "DTRAIN_AFFINITY is 'always'; possible: auto, none" in wrong


def test_srun_that_binds_its_tasks_is_left_alone(monkeypatch: pytest.MonkeyPatch, two_sockets: Path) -> None:
    own = os.sched_getaffinity(0)
    task = Environment(0, 0, 2, 2, "srun")
    monkeypatch.setenv("SLURM_CPU_BIND_TYPE", "mask_cpu:")
    assert take_place(task, GPUS[:2], two_sockets) == (len(own), [])
    assert os.sched_getaffinity(0) == own
    monkeypatch.setenv("SLURM_CPU_BIND_TYPE", "none")
    assert take_place(task, GPUS[:2], two_sockets)[0] == max(1, len(own) // 2)
    monkeypatch.setenv("DTRAIN_AFFINITY", "never")
    with pytest.raises(ConfigError, match="possible: auto, none"):
        take_place(task, GPUS[:2], two_sockets)


def test_this_machine_is_read_too() -> None:
    machine, own = read_machine(), os.sched_getaffinity(0)
    if not machine.nodes:
        pytest.skip("SKIPPED, NOT TESTED HERE: no NUMA nodes in /sys")
    assert own <= frozenset().union(*machine.nodes.values())
    assert 1 <= machine.cores_in(own) <= len(own)
    assert clock_speed(affinity_device(), own).ghz >= 0


def affinity_device() -> object:
    import torch

    return torch.device("cpu")


def test_a_rank_may_have_as_many_files_open_as_the_system_allows() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        raise_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


# ---------------------------------------------------------------------------------------------------- interfaces


def chosen(monkeypatch: pytest.MonkeyPatch, usable: dict[str, list[str]], gpu: bool, **env: str) -> list[str]:
    for name in (interfaces.GLOO, interfaces.NCCL):
        monkeypatch.setenv(name, "")  # so that what is chosen does not outlive the test
        monkeypatch.delenv(name)
    for name, value in {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", **env}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(interfaces, "usable_interfaces", lambda: usable)
    monkeypatch.setattr(interfaces, "address_towards", lambda host, port: "10.0.0.5" if host == "10.0.0.1" else "")
    return interfaces.choose_interfaces(Environment(1, 0, 4, 2, "torchrun"), gpu)


SEVERAL = {"eth0": ["10.0.0.5"], "ib0": ["192.168.1.5"], "eth1": ["172.16.0.5"]}


def test_of_several_interfaces_the_one_that_leads_to_the_others_is_taken_and_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert chosen(monkeypatch, SEVERAL, gpu=True) == [
        "between nodes gloo uses eth0, NCCL ib0 (of eth0, ib0, eth1); GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose "
        "others"
    ]
    assert (os.environ[interfaces.GLOO], os.environ[interfaces.NCCL]) == ("eth0", "=ib0")
    (line,) = chosen(monkeypatch, {"eth0": ["10.0.0.5"], "eth1": ["172.16.0.5"]}, gpu=True)
    assert "NCCL eth0" in line
    (line,) = chosen(monkeypatch, SEVERAL, gpu=True, GLOO_SOCKET_IFNAME="eth1")
    assert "gloo uses eth1" in line, "what somebody chose holds"
    assert chosen(monkeypatch, {"eth0": ["10.0.0.5"]}, gpu=True) == [], "with one there is nothing to say"
    assert os.environ[interfaces.GLOO] == "eth0" and interfaces.NCCL not in os.environ
    assert interfaces.choose_interfaces(Environment(1, 1, 2, 2, "torchrun"), True) == [], "nor on one node"


def test_this_machines_interfaces_lead_to_other_machines() -> None:
    assert not {name for name in interfaces.usable_interfaces() if name.startswith(("lo", "docker", "veth"))}


# -------------------------------------------------------------------------------------------------------- clocks


def test_the_clock_of_a_slow_rank_is_compared_with_the_others(tmp_path: Path) -> None:
    for cpu, khz in ((0, 1_200_000), (1, 1_400_000), (2, 3_000_000)):
        write(tmp_path / f"devices/system/cpu/cpu{cpu}/cpufreq/scaling_cur_freq", str(khz))
    device = affinity_device()
    assert clock_speed(device, {0, 1}, tmp_path).ghz == pytest.approx(1.3)
    slow, fast = ClockSpeed(1.2, "its power limit"), ClockSpeed(1.98)
    assert (
        compared(1, {0: fast, 1: slow, 2: fast}) == "its clock runs at 1.20 GHz, theirs at 1.98 GHz (its power limit)"
    )
    assert compared(1, {0: fast, 1: ClockSpeed(1.9), 2: fast}) == "its clock runs as fast as theirs (1.90 GHz)"
    assert compared(1, {1: slow}) == compared(1, {0: fast, 1: ClockSpeed(0.0)}) == ""


@pytest.mark.slow
def test_launch_takes_the_choice_to_the_ranks(run_cli: RunCli) -> None:
    result = run_cli(["launch", "nothing.yaml", "--affinity", "always"])
    assert result.rc == 2 and "invalid choice: 'always'" in result.stderr
