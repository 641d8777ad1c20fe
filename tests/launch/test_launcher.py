"""`dtrain launch`, for real: its exit status, its lines, its restarts, and that nothing outlives it."""

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import sqlite3
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from conftest import REPOSITORY, RunCli, Running
from ports import free_port
from whole_runs import EXACT, Place, figures, last, same_training

from dtrain import cli
from dtrain.checkpoint.resume import find_start
from dtrain.config.errors import ConfigError
from dtrain.launch import launcher, rendezvous
from dtrain.launch.agent import End
from dtrain.launch.console import Console
from dtrain.tracking.run_folder import read_run

pytestmark = pytest.mark.timeout(900)

# 40 steps of two forwards each.
LIVELY = {
    **EXACT, "trainer.pictures": False, "trainer.checkpoint_every_steps": 1, "loaders.train.size": 59,
    "trainer.max_epochs": 5,
}  # fmt: skip
LONG = {**LIVELY, "trainer.max_epochs": 100000, "trainer.early_stop_patience": None}
PARTS = range(6)  # of a soak test, so that each is short enough to be run on its own


def two(place: Place, file: str, *words: str, **options: Any) -> Running:
    """Two ranks under `dtrain launch`, which runs on."""
    return place.start("launch", file, "--nproc-per-node", "2", *words, **options)[0]


def ranks_of(running: Running, *needles: str) -> dict[int, int]:
    """Rank -> process, of the ranks that live."""
    found = {}
    for pid in running.tagged.pids():
        try:
            environ = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        rank = next((int(text[5:]) for text in environ if text.startswith("RANK=")), None)
        if rank is not None and "train" in words and parent == running.pid:
            found[rank] = pid
    return found


def until(condition: Callable[[], Any], running: Running, seconds: float = 250) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert running.process.poll() is None, running.output().text
        assert time.monotonic() < end, running.output().text
        time.sleep(0.02)


def steps_done(run: Path) -> int:
    try:
        return max(figures(run).get("train/loss", {0: 0.0}))
    except (OSError, ValueError):
        return 0


def text_of(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def undisturbed(place: Place) -> Path:
    """The lively training on two ranks, to its end."""

    def make() -> str:
        result = two(place, place.config("lively", **LIVELY)).result(200)
        assert result.rc == 0, result.text
        return str(place.path("lively"))

    return Path(place.once("lively", make))


# ------------------------------------------------------------------------------------------------------ before a start


def test_a_wrong_config_starts_nothing(run_cli: RunCli, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("model: {name: Nothing}\nloaders: {name: Digits, batch_sizes: 3}\n")
    code = "import sys; from dtrain.cli import main; status = main(['launch', 'bad.yaml', '--nproc-per-node', '2']); "
    code += "assert 'torch' not in sys.modules; sys.exit(status)"
    result = run_cli([], launcher=[sys.executable, "-c", code, "#"])
    assert result.rc == 2 and "bad.yaml:1:" in result.stderr and "Traceback" not in result.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nproc-per-node", "many"], "--nproc-per-node many: expected a number from 1 on, or auto"),
        (["--nnodes", "2"], "--nnodes 2 needs --rdzv-endpoint HOST:PORT"),
        (["--nnodes", "0"], "expected 1 or more"),
        (["--max-restarts", "-1"], "expected a whole number"),
        (["--rdzv-endpoint", "node1"], "expected HOST:PORT"),
        (["--nproc-per-node", "2", "device=cuda"], "sees no GPU; possible here: auto, cpu"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setattr(cli, "end_at_once", lambda say: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    try:
        status = cli.main(["launch", "configfiles/digits.yaml", *words])
    except SystemExit as error:
        status = int(str(error.code))
    out = capsys.readouterr()
    assert status == 2 and message in out.err and len(out.err.splitlines()) == 1


def test_more_ranks_than_gpus_are_refused_and_auto_takes_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)

    def ranks(given: str, config: dict[str, Any]) -> int:
        return launcher._ranks_here(cli.parse(["launch", "c.yaml", "--nproc-per-node", given]), config)

    assert (
        ranks("auto", {}) == 2
        and ranks("auto", {"device": "cpu"}) == ranks("auto", {"device": "cuda:1"}) == 1
        and ranks("2", {"device": "cuda"}) == 2
    )
    assert ranks("4", {"device": "cpu"}) == 4 and ranks("4", {"trainer": {"ddp": {"backend": "gloo"}}}) == 4
    with pytest.raises(ConfigError, match=r"8 ranks on this node, but 2 GPU\(s\)"):
        ranks("8", {})


@pytest.mark.slow
def test_the_launcher_itself_may_have_as_many_files_open_as_the_system_allows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its store has a connection with each rank of the job: under the usual limit of 1,024, 8,000 could not meet."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(
        launcher.NodeRun, "run", lambda _: found.append(resource.getrlimit(resource.RLIMIT_NOFILE)) or 0
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = ["--nproc-per-node", "2", "device=cpu", f"trainer.checkpoint_dir={tmp_path / 'run'}"]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, before[1]))
        assert cli.main(["launch", str(REPOSITORY / "configfiles" / "digits.yaml"), *words]) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert found == [(before[1], before[1])]


@pytest.mark.slow
def test_a_port_in_use_is_named_with_its_owner() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for nodes in (1, 2):
            with pytest.raises(ConfigError, match=rf"port {port} is in use by process {os.getpid()} \("):
                rendezvous.is_held_here("localhost", port, nodes)
    assert rendezvous.is_held_here("localhost", port, 2)


def test_accelerates_own_settings_reach_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tmp_path / "accelerate.yaml"
    settings.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nmixed_precision: bf16\n"
        "num_processes: 8\nnum_machines: 1\ngpu_ids: all\nuse_cpu: false\ndebug: false\n"
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr("accelerate.commands.launch.default_config_file", str(settings))
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(settings))
    found = launcher._accelerate_settings(2)
    assert found["ACCELERATE_MIXED_PRECISION"] == "bf16" and found["OMP_NUM_THREADS"] == "3"


# ---------------------------------------------------------------------------------------------------- lines and status

CHATTER = """
import os, sys
from toy import MLP

print("threads", os.environ["OMP_NUM_THREADS"])
for number in range(300):
    print(f"long {number} " + "x" * 6000 + ".")
    print(f"short {number} " + "y" * 50 + ".", file=sys.stderr)
print(f"secret at https://me:{'p' + 'w'}@host/", flush=True)


class Chatter(MLP):
    pass
"""


def test_lines_stay_whole_and_a_failure_before_the_first_step_is_reported_and_not_restarted(place: Place) -> None:
    place.write("chatter.py", CHATTER)
    file = place.config("chatter", modules=["chatter", "toy"], **{"model.name": "Chatter", "trainer.resume": "none"})
    env = {key: value for key, value in place.env.items() if key != "OMP_NUM_THREADS"}
    place.env, kept = env, place.env
    try:
        result = two(place, file, "--max-restarts", "3", do="train 1 rank 1 raise").result(200)
    finally:
        place.env = kept
    assert result.rc == 1, result.text[-3000:]
    lines = result.stdout.splitlines()
    head = r"rank [01]  \d{4}-\d\d-\d\d \d\d:\d\d:\d\d  "
    assert [line for line in lines if not re.match(head, line)] == []
    for rank in (0, 1):
        log = (place.path("chatter") / "logs" / f"rank-{rank}.log").read_text()
        for kind, text in (("long", "x" * 6000), ("short", "y" * 50)):
            wanted = [f"{kind} {number} {text}." for number in range(300)]
            shown = [line.split("  ", 2)[2] for line in lines if line.startswith(f"rank {rank}  ")]
            assert [line for line in shown if line.startswith(f"{kind} ")] == wanted
            assert [line for line in log.splitlines() if line.startswith(f"{kind} ")] == wanted
        assert "https://***@host/" in log
        assert f"threads {max(1, len(os.sched_getaffinity(0)) // 2)}\n" in log
    messages = result.stderr
    assert "rank 1 failed first: RuntimeError: the toy is broken at " in messages
    assert "(exit status 1; its output: " in messages
    assert "toy.py" in messages and messages.count("failed first") == 1 and "restart" not in messages
    facts = read_run(place.path("chatter"))
    assert (facts["attempt"], facts["reason"]) == (1, "rank 1: RuntimeError: the toy is broken")


@pytest.mark.slow
def test_before_the_first_step_the_rank_that_failed_is_named_and_not_one_that_was_asked_to_stop(place: Place) -> None:
    """The others are ended for it, and say 75 while they import, where nothing is lost."""
    file = place.config("no-network")
    result = two(place, file, env={"GLOO_SOCKET_IFNAME": "nosuch0"}).result(200)
    (line,) = [line for line in result.stderr.splitlines() if "failed first" in line]
    assert result.rc == 1 and "failed first (exit status 1; its output: " in line, result.text
    assert "nosuch0" in Path(line.rpartition("its output: ")[2].rstrip(")")).read_text()


def test_a_log_that_is_not_there_is_not_named(place: Place) -> None:
    place.write("no-logs", "a file where the folder of logs should be")
    words = ("--log-dir", "no-logs", "trainer.max_epochs=1")
    result = two(place, place.config("no-logs"), *words, do="train 1 rank 1 raise").result(200)
    (line,) = [line for line in result.stderr.splitlines() if "failed first" in line]
    assert "rank 1 failed first: RuntimeError: the toy is broken at " in line and line.endswith(
        "act (exit status 1)"
    ), result.text


def test_a_killed_rank_is_named_and_the_ranks_resume_from_the_last_checkpoint(place: Place) -> None:
    whole = undisturbed(place)
    file = place.config("restart", **LIVELY, **{"trainer.resume": "none"})
    result = two(place, file, "--max-restarts", "1", do="train 50 rank 1 KILL").result(200)
    assert result.rc == 0, result.text
    assert "rank 1 failed first (killed by SIGKILL; its output: " in result.stderr
    assert "restart 1 of 1, from the last checkpoint" in result.stderr
    same_training(whole, place.path("restart"))
    facts = read_run(place.path("restart"))
    assert (facts["attempt"], facts["state"]) == (2, "FINISHED")
    assert figures(whole) == figures(place.path("restart"))


@pytest.mark.soak
def test_a_rank_that_is_killed_again_and_again_ends_the_job_when_the_restarts_are_used_up(place: Place) -> None:
    words = ("--max-restarts", "1", "--log-dir", "logs-again")
    result = two(place, place.config("again", **LONG), *words, do="train 9 rank 1 KILL").result(200)
    assert result.rc == 1, result.text
    assert "last words " + "z" * 6000 in (place.folder / "logs-again" / "rank-1.log").read_text().splitlines()[-1]
    assert result.stderr.count("rank 1 failed first (killed by SIGKILL; its output: ") == 2
    assert result.stderr.count("restart ") == 1
    facts = read_run(place.path("again"))
    assert (facts["attempt"], facts["state"], facts["exit_status"]) == (2, "FAILED", 1)
    assert facts["reason"] == "rank 1 exited without reporting an error"


def test_a_rank_that_waits_while_another_is_killed_has_failed_not_stopped(place: Place) -> None:
    """torchrun ends it with the same signal that asks to save and stop, and nothing must come of that here."""
    running = two(place, place.config("waits-killed", **LONG), env={"TOY_LOAD": "sample 7 rank 0 sleep"})
    run = place.path("waits-killed")
    until(lambda: "asleep" in text_of(run / "logs" / "rank-0.log") and len(ranks_of(running)) == 2, running)
    os.kill(ranks_of(running)[1], signal.SIGKILL)
    result = running.result(200)
    assert result.rc == 1 and "rank 1 failed first (killed by SIGKILL" in result.stderr, result.text
    assert (read_run(run)["state"], read_run(run)["exit_status"]) == ("FAILED", 1)


@pytest.mark.soak
@pytest.mark.parametrize("how", ["KILL", "raise", "exit", "vanish", "SEGV"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_ends_in_whatever_way_takes_all_down_and_is_named(place: Place, how: str, victim: int) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    chance, seconds = random.Random(seed), []
    for number in range(5):
        name = f"down-{how}-{victim}-{number}"
        trouble = f"train {chance.randrange(3, 60)} rank {victim} {how}"
        running = two(place, place.config(name, **LONG), env={"TOY_DO": trouble})
        until(lambda running=running: len(ranks_of(running)) == 2, running)
        pid = ranks_of(running)[victim]
        while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.02)
        began = time.monotonic()
        result = running.result(200)
        assert running.tagged.wait_gone(200), running.tagged.command_lines()
        seconds.append(round(time.monotonic() - began, 2))
        assert result.rc == 1 and f"dtrain launch: rank {victim} failed first" in result.stderr, result.text
        assert read_run(place.path(name))["state"] == "FAILED"
    print("seconds", seconds)
    assert max(seconds) < 10


@pytest.mark.parametrize(
    "name", ["USR1", *(pytest.param(each, marks=pytest.mark.soak) for each in ("TERM", "HUP", "USR2", "QUIT"))]
)
def test_a_signal_to_the_launcher_saves_and_asks_for_another_start(place: Place, name: str) -> None:
    """Under accelerate's settings, which changes nothing of it."""
    running = two(place, place.config(f"stop-{name}", **LONG), "--launcher", "accelerate")
    run = place.path(f"stop-{name}")
    until(lambda: steps_done(run) >= 6, running)
    os.kill(running.pid, signal.Signals[f"SIG{name}"])
    result = running.result(200)
    assert result.rc == 75, result.text
    facts = read_run(run)
    passed_on = "TERM" if name == "QUIT" else name  # which Python's ranks would end at with their stacks alone
    assert (facts["state"], facts["exit_status"], facts["reason"]) == ("KILLED", 75, f"signal SIG{passed_on}")
    assert last(run).state["step"] >= steps_done(run) and facts["world_size"] == 2
    assert facts["save_seconds"] > 0


# ----------------------------------------------------------------------------------------------------------- no orphan


def killed(place: Place, name: str, chance: random.Random) -> float:
    """The launcher killed at a random moment: how long its ranks and their workers lived on."""
    running = two(place, place.config(name, **LONG), cold=True)
    run = place.path(name)
    if chance.random() < 0.3:
        time.sleep(chance.uniform(0, 8))  # in the start-up
    else:
        until(lambda: steps_done(run) >= 3, running)
        time.sleep(chance.uniform(0, 2))
    os.kill(running.pid, signal.SIGKILL)
    began = time.monotonic()
    running.process.wait(200)
    assert running.tagged.wait_gone(200), running.tagged.command_lines()
    shutil.rmtree(run, ignore_errors=True)
    return time.monotonic() - began


def test_nothing_outlives_a_launcher_that_is_killed(place: Place) -> None:
    running = two(place, place.config("orphans", **LONG))
    until(lambda: steps_done(place.path("orphans")) >= 3, running)
    assert len(ranks_of(running)) == 2 and len(running.tagged.pids()) > 3, "loader workers are there, too"
    os.kill(running.pid, signal.SIGKILL)
    running.process.wait(200)
    assert running.tagged.wait_gone(200), running.tagged.command_lines()


@pytest.mark.soak
@pytest.mark.parametrize("part", PARTS)
def test_nothing_outlives_a_launcher_killed_at_any_moment(place: Place, part: int) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    chance = random.Random(seed)
    print("seconds", [round(killed(place, f"orphans-{part}-{number}", chance), 2) for number in range(5)])


@pytest.mark.soak
def test_of_a_launcher_that_is_killed_the_sender_alone_lives_on_for_a_while(place: Place) -> None:
    """It says in MLflow how the run ended; where nobody answers it gives up."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        running = two(place, place.config("sender", **LONG, **{"mlflow.tracking_uri": uri}), mlflow=True)
        until(lambda: steps_done(place.path("sender")) >= 3, running)
        os.kill(running.pid, signal.SIGKILL)
        running.process.wait(200)
        time.sleep(5)
        assert [line for line in running.tagged.command_lines() if "dtrain.tracking.sender" not in line] == []
        assert running.tagged.wait_gone(200), running.tagged.command_lines()
    assert read_run(place.path("sender"))["state"] == "FAILED"


@pytest.mark.soak
@pytest.mark.parametrize("part", PARTS)
def test_a_stop_at_any_moment_through_the_launcher_loses_no_step(place: Place, part: int) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    chance, moments = random.Random(seed), []
    for number in range(5):
        name = f"stopped-{part}-{number}"
        running, run = two(place, place.config(name, **LONG), cold=True), place.path(name)
        if chance.random() < 0.5:
            time.sleep(chance.uniform(1, 9))  # mostly in the start-up
        else:
            until(lambda run=run: steps_done(run) >= 3, running)
            time.sleep(chance.uniform(0, 2))
        os.kill(running.pid, chance.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]))
        result, done = running.result(200), steps_done(run)
        assert result.rc == 75 or (result.rc == 130 and not done), result.text
        assert not done or (last(run).state["step"] >= done and read_run(run)["state"] == "KILLED")
        assert running.tagged.wait_gone(200), running.tagged.command_lines()
        moments.append(done)
        shutil.rmtree(run, ignore_errors=True)
    print("steps done", moments)


def interrupted(
    place: Place, name: str, times: int, pause: float, expect: int, send: Callable[[int, int], None]
) -> None:
    """Ctrl-C so many times, after `pause` seconds each: the exit status, and that nothing is left."""
    # A training that is stuck does not heed the first.
    env = {"TOY_DO": "train 9 rank 1 sleep"} if expect == 130 else {}
    running, run = two(place, place.config(name, **LONG), env=env), place.path(name)
    until(lambda: "asleep" in text_of(run / "logs" / "rank-1.log") if env else steps_done(run) >= 3, running)
    for number in range(times):
        time.sleep(pause if number else 0.0)
        if running.process.poll() is None:
            send(running.pid, signal.SIGINT)
    result = running.result(200)
    assert result.rc == expect, result.text
    assert running.tagged.wait_gone(200), running.tagged.command_lines()


def test_ctrl_c_twice_is_immediate_and_no_rank_stays(place: Place) -> None:
    interrupted(place, "ctrl-c", 2, 3.0, 130, os.kill)  # far from the half second within which two are one


@pytest.mark.soak
@pytest.mark.parametrize(
    ("times", "pause", "expect"),
    [
        (1, 0.0, 75),
        (2, 0.8, 130),
        (3, 0.1, 75),  # within half a second: one, delivered several times
        (3, 0.6, 130),
        (10, 0.2, 130),
    ],
)
@pytest.mark.parametrize("send", [os.kill, os.killpg])
def test_ctrl_c_any_number_of_times_to_the_launcher_or_its_terminals_group(
    place: Place, times: int, pause: float, expect: int, send: Callable[[int, int], None]
) -> None:
    for number in range(4):
        interrupted(place, f"ctrl-c-{send.__name__}-{times}-{pause}-{number}", times, pause, expect, send)


@pytest.mark.soak
@pytest.mark.parametrize("part", range(5))
def test_jobs_that_start_together_do_not_meet(place: Place, part: int) -> None:
    jobs = [two(place, place.config(f"beside-{part}-{number}")) for number in range(4)]
    results = [job.result(200) for job in jobs]
    assert [result.rc for result in results] == [0] * 4, "".join(result.text for result in results)


@pytest.mark.soak
@pytest.mark.parametrize("part", PARTS)
def test_a_rank_killed_at_any_moment_is_restarted_bit_for_bit(place: Place, part: int) -> None:
    whole = undisturbed(place)
    seed = random.randrange(1 << 30)
    print("seed", seed)
    chance, restarted = random.Random(seed), 0
    for number in range(4):
        name, store = f"any-{part}-{number}", place.folder / f"any-{part}-{number}.db"
        file = place.config(name, **LIVELY, **{"mlflow.tracking_uri": f"sqlite:///{store}"})
        running = two(place, file, "--max-restarts", "2", mlflow=part == 0)
        run, victim = place.path(name), chance.choice([0, 1])
        until(lambda run=run: steps_done(run) >= 3, running)
        time.sleep(chance.uniform(0, 1.0))
        if pid := ranks_of(running).get(victim):
            os.kill(pid, signal.SIGKILL)
        result = running.result(200)
        assert result.rc == 0, result.text
        if read_run(run)["attempt"] > 1:
            restarted += 1
            assert f"rank {victim} failed first" in result.stderr, result.text
        same_training(whole, run)
        assert figures(whole) == figures(run)
        if part == 0:
            with closing(sqlite3.connect(store)) as found:
                assert found.execute("SELECT status FROM runs").fetchall() == [("FINISHED",)]
    print("restarted", restarted, "of 4")
    assert restarted >= 2, "else there was nothing to see"


# --------------------------------------------------------------------------------------------------------- two machines


def one_node_lost(place: Place, machines: list[list[str]], name: str, at_step: int, mlflow: bool = False) -> None:
    """Node 1's launcher is killed and started again: the same training, in the same run, as if nothing had been."""
    words = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-endpoint", "10.77.0.1:29555", "--max-restarts", "2"]
    whole = undisturbed(place)
    store = place.folder / f"{name}.db"
    file = place.config(name, **LIVELY, **{"mlflow.tracking_uri": f"sqlite:///{store}"})

    def node(number: int) -> Running:
        return place.start("launch", file, *words, launcher=machines[number], mlflow=mlflow)[0]

    first, second = node(0), node(1)
    run = place.path(name)
    until(lambda: steps_done(run) >= at_step, first)
    os.kill(second.pid, signal.SIGKILL)
    second.process.wait(200)
    again = node(1)
    results = [running.result(200) for running in (first, again)]
    assert [result.rc for result in results] == [0, 0], "".join(result.text for result in results)
    facts = read_run(run)
    assert (facts["attempt"], facts["state"], facts["world_size"]) == (2, "FINISHED", 2), results[0].text
    assert "restart 1 of 2, from the last checkpoint" in results[0].stderr
    assert (run / "logs" / "rank-0.log").exists()
    same_training(whole, run)
    assert figures(whole) == figures(run)
    if mlflow:
        with closing(sqlite3.connect(store)) as found:
            assert found.execute("SELECT status FROM runs").fetchall() == [("FINISHED",)]


def test_a_node_that_is_killed_and_comes_back_resumes_the_same_run(place: Place, machines: list[list[str]]) -> None:
    one_node_lost(place, machines, "nodes", at_step=4)


# `dtrain launch`, which waits for other nodes as long as its arguments say: for the rendezvous, for all nodes.
IMPATIENT = """
import sys
from dtrain.launch import agent
from dtrain import cli
agent.STORE_SECONDS, agent.NODES_SECONDS = STORE, NODES
sys.exit(cli.main(sys.argv[3:]))  # after: -c -m dtrain
"""


def impatient(
    place: Place, python: list[str], endpoint: str, file: str, *words: str, store: int = 6, nodes: int = 6
) -> Running:
    """One node of two."""
    launcher = [*python, "-c", IMPATIENT.replace("STORE, NODES", f"{store}, {nodes}")]
    words = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-endpoint", endpoint, *words)
    return place.start("launch", file, *words, launcher=launcher)[0]


def free_endpoint() -> str:
    return f"localhost:{free_port()}"


def listens(pid: int, port: int) -> bool:
    """Whether somebody in a process's network does on a port."""
    tables = [text_of(Path(f"/proc/{pid}/net/{name}")) for name in ("tcp", "tcp6")]
    return any(re.search(rf":{port:04X} \S+ 0A ", table) for table in tables)


@pytest.mark.soak
def test_a_node_that_never_comes_is_not_waited_for_forever(place: Place) -> None:
    endpoint = free_endpoint()
    result = impatient(place, [sys.executable], endpoint, place.config("alone-of-two")).result(200)
    assert result.rc == 1
    assert f"dtrain launch: not all of the 2 nodes joined at {endpoint}" in result.stderr, result.text
    assert "Traceback" not in result.text


@pytest.mark.soak
def test_a_rendezvous_that_is_not_there_is_named(place: Place, machines: list[list[str]]) -> None:
    result = impatient(place, machines[1], "10.77.0.1:29556", place.config("nobody")).result(200)
    assert result.rc == 1
    assert "no rendezvous at 10.77.0.1:29556: its node has not started, or is gone" in result.stderr, result.text
    assert "Traceback" not in result.text


def test_ctrl_c_while_the_other_node_is_waited_for_ends_at_once(place: Place) -> None:
    endpoint = free_endpoint()
    running = impatient(place, [sys.executable], endpoint, place.config("waits"), store=600, nodes=600)
    host, port = endpoint.split(":")
    until(lambda: rendezvous.is_rendezvous(host, int(port)), running)
    os.kill(running.pid, signal.SIGINT)
    assert running.result(200).rc == 130


def test_a_lost_node_that_held_the_rendezvous_ends_the_others_in_words(place: Place, machines: list[list[str]]) -> None:
    file = place.config("headless", **LONG)
    endpoint = "10.77.0.1:29557"
    words: Any = (endpoint, file, "--max-restarts", "1")
    first = impatient(place, machines[0], *words, store=12, nodes=600)
    until(lambda: listens(first.pid, 29557), first)  # so that the second one, which is impatient, finds it
    second = impatient(place, machines[1], *words, store=12, nodes=600)
    run = place.path("headless")
    until(lambda: steps_done(run) >= 4, first)
    os.kill(first.pid, signal.SIGKILL)
    first.process.wait(200)
    result = second.result(200)
    assert result.rc == 1, result.text
    assert "no rendezvous at 10.77.0.1:29557: its node has not started, or is gone" in result.stderr, result.text
    assert last(run).state["step"] >= 2


@pytest.mark.soak
@pytest.mark.parametrize("part", PARTS)
def test_a_node_lost_at_any_step_changes_nothing(place: Place, machines: list[list[str]], part: int) -> None:
    one_node_lost(place, machines, f"nodes-{part}", at_step=random.randrange(2, 20), mlflow=part == 0)


# ----------------------------------------------------------------------------------------------------------- the parts


def test_the_likelier_cause_comes_first() -> None:
    inf = float("inf")
    ends = [End(0, 1, 5.0), End(1, -15, inf), End(2, 3, inf), End(3, 0, inf), End(4, -9, inf), End(5, 1, 4.0)]
    ends += [End(6, 75, inf), End(7, 130, inf)]  # asked to stop, as rank 1
    assert [end.rank for end in sorted(ends, key=launcher._likelihood)] == [4, 3, 2, 5, 0, 1, 6, 7]


@pytest.mark.parametrize(
    ("ends", "asked", "has_begun", "status"),
    [
        ([(0, 0, 1.0), (1, 0, 1.0)], [], True, 0),
        ([(0, 75, 1.0), (1, 75, 1.0)], ["TERM"], True, 75),
        ([(0, 75, 1.0), (1, -9, None)], ["TERM"], True, 75),  # slow to end, after all was saved
        ([(0, 75, None), (1, 1, 1.0)], [], False, 1),  # rank 0 was ended in its start-up for rank 1's sake
        ([(0, 75, None), (1, -15, None)], ["TERM"], False, 75),
        ([(0, -2, None), (1, 130, 1.0)], ["INT"], False, 130),
        ([(0, 1, 1.0), (1, 2, 1.0)], [], False, 2),
        ([(0, 0, None), (1, 0, None)], [], True, 1),  # os._exit(0)
        ([(0, 75, 1.0), (1, 75, 1.0)], [], True, 75),  # a time limit
    ],
)
def test_the_status_of_a_job(tmp_path: Path, ends: list[Any], asked: list[str], has_begun: bool, status: int) -> None:
    node = launcher.NodeRun(None, tmp_path, None, False)
    node.ends = [End(rank, code, float("inf") if reported is None else reported) for rank, code, reported in ends]
    node.requests = [(signal.Signals[f"SIG{name}"], 0.0) for name in asked]
    node.has_begun = has_begun
    assert node._status() == status


def test_who_stops_a_job_that_waits_to_resume_has_stopped_it_early(tmp_path: Path) -> None:
    """A node was lost and is waited for: all that there was is saved, and nothing runs."""
    node = launcher.NodeRun(SimpleNamespace(max_restarts=2, nodes=1, spares=0), tmp_path, None, False)
    assert node._ended([End(0, -9, float("inf")), End(1, 1, 1.0)], has_begun=True, can_restart=True)
    node.requests = [(signal.SIGTERM, 0.0)]
    assert node._status() == 75


# A terminal, in which a command is started.
TERMINAL = """
import os, pty, sys
sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))
"""


def test_on_a_terminal_which_is_rank_0s_own_it_leaves_its_log_all_the_same(place: Place) -> None:
    file = place.config("terminal", **{"trainer.max_epochs": 2})
    in_terminal = [sys.executable, "-c", TERMINAL, sys.executable]
    (running,) = place.start("launch", file, "--nproc-per-node", "2", launcher=in_terminal)
    result = running.result(200)
    assert result.rc == 0, result.text
    log = (place.path("terminal") / "logs" / "rank-0.log").read_text()
    assert "epoch 2" in log and "epoch 2" in result.stdout


def test_where_this_machines_name_means_the_loopback_gloo_takes_what_leads_to_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 1))
        except OSError:
            pytest.skip("SKIPPED, NOT TESTED HERE: this machine has no way to other ones")
        own = probe.getsockname()[0]
    assert rendezvous.address_towards("localhost", 29500) == "localhost", "other nodes know it by that name"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    rendezvous.set_gloo_interface("localhost")
    interface = os.environ.pop("GLOO_SOCKET_IFNAME")
    assert own in {each.address for each in psutil.net_if_addrs()[interface]}


@pytest.mark.parametrize(("facts", "seconds"), [({}, 600), ({"save_seconds": 0.5}, 61.5), ({"save_seconds": 300}, 960)])
def test_ranks_get_time_to_save_by_how_long_the_last_save_took(
    tmp_path: Path, facts: dict[str, float], seconds: float
) -> None:
    (tmp_path / "run.json").write_text(json.dumps(facts))
    assert launcher.NodeRun(None, tmp_path, None, False).shutdown_seconds() == seconds


def test_a_restart_resumes_whatever_the_training_began_from(tmp_path: Path) -> None:
    def found(resume: str, is_restart: bool) -> Any:
        return find_start(tmp_path / "run", resume, "name", {}, None, is_restart)

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"state": "FAILED", "run_name": "first"}))
    assert found("none", False).moves_aside and not found("none", True).moves_aside
    assert found("none", True).run_name == "first"


def test_a_line_without_end_and_a_bar_are_shown_and_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    console = Console(tmp_path / "logs", is_terminal=False)
    console.listen(tmp_path / "pipe", 3)
    with (tmp_path / "pipe").open("wb") as pipe:
        pipe.write(b"10%\r20%\r30%\n\x1efor the log alone\nthe end")
    console.drain()
    lines = capfd.readouterr().out.splitlines()
    assert [re.sub(r"\S+ \S+:\S+:\S+", "T", line) for line in lines[:1]] == ["rank 3  T  30%"]
    assert lines[-1].endswith("the end")
    assert len(lines) == 2
    assert (tmp_path / "logs" / "rank-3.log").read_bytes() == b"10%\r20%\r30%\nfor the log alone\nthe end\n"


@pytest.mark.parametrize(("nodes", "spares", "is_refused"), [(1, 0, True), (1, 1, False), (2, 0, False)])
def test_only_a_launcher_of_one_machine_wants_the_run_folder_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: int, spares: int, is_refused: bool
) -> None:
    """A spare that comes later finds the others at work."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(launcher, "writer_of", lambda folder: "it is being written")
    monkeypatch.setattr(launcher, "_ranks_here", lambda options, config: 1)

    def reached(*_: Any) -> None:
        raise ConfigError("not refused")

    monkeypatch.setattr(launcher, "is_held_here", reached)
    options = argparse.Namespace(nnodes=nodes, spares=spares, affinity=None, launcher="torchrun")
    config = {"trainer": {"checkpoint_dir": str(tmp_path / "run")}}
    with pytest.raises(ConfigError, match="it is being written" if is_refused else "not refused"):
        launcher.launch(config, options, "node1", 29500)
