"""The fixtures of conftest.py do what the other tests trust them to do."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TAG, RunCli, StartCli, Tagged
from whole_runs import Place

# Stands before `-m dtrain ...`, which python -c then takes for the script's arguments.
PLUGINS = 'pytest_plugins = ["machines", "published", "stores", "whole_runs"]'  # a folder of its own does not have them
SLEEPER = [sys.executable, "-c", "import time; print('awake', flush=True); time.sleep(1000)"]
ARGUMENTS = [sys.executable, "-c", "import os, sys; print(sys.argv[1:], os.getcwd()); sys.exit(7)"]


def test_a_command_line_reports_its_status_output_and_folder(run_cli: RunCli, tmp_path: Path) -> None:
    result = run_cli(["a.yaml", tmp_path / "b"], launcher=ARGUMENTS)
    assert result.rc == 7
    assert result.stdout == f"{['-m', 'dtrain', 'a.yaml', str(tmp_path / 'b')]} {tmp_path}\n"
    assert result.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_a_command_line_that_takes_too_long_is_killed_and_shown(start_cli: StartCli, tagged: Tagged) -> None:
    running = start_cli([], launcher=SLEEPER)
    while "awake" not in running.output().stdout:
        time.sleep(0.01)
    with pytest.raises(pytest.fail.Exception, match=r"still running after 0\.1 s") as failure:
        running.result(0.1)
    assert "awake" in str(failure.value)
    assert tagged.pids() == []


def test_foreign_rank_variables_do_not_reach_the_processes(run_cli: RunCli, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(name, "foreign")
    code = (
        "import os; print(*(os.environ.get(n) for n in ('RANK', 'LOCAL_RANK', 'SLURM_PROCID', 'MLFLOW_TRACKING_URI')))"
    )
    assert run_cli([], launcher=[sys.executable, "-c", code]).stdout.split() == ["None"] * 4


def test_env_adds_and_takes_away(run_cli: RunCli) -> None:
    code = "import os; print(os.environ.get('OMP_NUM_THREADS'), os.environ['RANK'])"
    result = run_cli([], launcher=[sys.executable, "-c", code], env={"OMP_NUM_THREADS": None, "RANK": "3"})
    assert result.stdout.split() == ["None", "3"]


def test_a_process_that_leaves_its_session_is_still_found(tagged: Tagged, clean_env: dict[str, str]) -> None:
    launched = subprocess.run(["setsid", "--fork", "sleep", "1000"], env=clean_env, check=True, timeout=200)
    assert launched.returncode == 0
    while not [line for line in tagged.command_lines() if line.endswith("sleep 1000")]:
        time.sleep(0.01)  # /proc shows a process that is being started with no environment
    assert not tagged.wait_gone(0.1)
    tagged.kill()
    assert tagged.pids() == []


def test_a_dead_process_that_nobody_waited_for_is_no_leftover(start_cli: StartCli, tagged: Tagged) -> None:
    running = start_cli([], launcher=SLEEPER)
    os.kill(running.pid, signal.SIGKILL)
    assert tagged.wait_gone(200)
    assert running.result(200).rc == -signal.SIGKILL


def test_a_test_that_leaves_a_process_behind_fails(pytester: pytest.Pytester) -> None:
    # The fixture's patience is cut short: here the failure is what is wanted.
    source = Path(__file__).parents[1].joinpath("conftest.py").read_text()
    shutil.copy(Path(__file__).parents[1].joinpath("forks.py"), pytester.path)
    pytester.makeconftest(source.replace("wait_gone(200)", "wait_gone(0.2)").replace(PLUGINS, ""))
    pytester.makepyfile(
        """
        import subprocess

        def test_leaves_a_process(clean_env):
            subprocess.Popen(["sleep", "1000"], env=clean_env, start_new_session=True)
        """
    )
    outcome = pytester.runpytest_subprocess("-p", "no:cacheprovider", timeout=200)
    outcome.assert_outcomes(passed=1, errors=1)
    outcome.stdout.fnmatch_lines(["*processes were left behind*", "*sleep 1000*"])


def test_what_fails_is_tried_once_more_and_what_the_first_try_said_is_shown(pytester: pytest.Pytester) -> None:
    shutil.copy(Path(__file__).parents[1].joinpath("forks.py"), pytester.path)
    pytester.makeconftest(Path(__file__).parents[1].joinpath("conftest.py").read_text().replace(PLUGINS, ""))
    pytester.makepyfile(
        """
        tries = []

        def test_fails_at_first():
            tries.append(1)
            assert len(tries) > 1, "the first try's own words"

        def test_fails():
            assert tries == "never so"
        """
    )
    outcome = pytester.runpytest_subprocess("--reruns", "1", timeout=200)
    assert outcome.parseoutcomes() == {"passed": 1, "failed": 1, "rerun": 2}
    outcome.stdout.fnmatch_lines(["*failed at first: *test_fails_at_first*", "*the first try's own words*"])


def test_a_second_try_finds_nothing_of_the_first(place: Place, tmp_path: Path) -> None:
    name = f"PYTEST_{tmp_path.name}"
    place.config(name)
    (place.path(name) / "checkpoints").mkdir(parents=True)
    place.forget("another.py::test")
    assert place.path(name).is_dir()
    place.forget("tests/repository/test_harness.py::test_a_second_try_finds_nothing_of_the_first")
    assert not place.path(name).exists()


def test_soak_tests_run_only_when_asked_for(pytester: pytest.Pytester) -> None:
    shutil.copy(Path(__file__).parents[1].joinpath("forks.py"), pytester.path)
    pytester.makeconftest(Path(__file__).parents[1].joinpath("conftest.py").read_text().replace(PLUGINS, ""))
    pytester.makepyfile("import pytest\n\n@pytest.mark.soak\ndef test_long():\n    pass\n")
    pytester.makeini("[pytest]\nmarkers = soak: long")
    pytester.runpytest_subprocess(timeout=200).assert_outcomes(skipped=1)
    pytester.runpytest_subprocess("--soak", timeout=200).assert_outcomes(passed=1)


def test_fast_leaves_out_what_is_slow_or_starts_processes(pytester: pytest.Pytester) -> None:
    shutil.copy(Path(__file__).parents[1].joinpath("forks.py"), pytester.path)
    pytester.makeconftest(Path(__file__).parents[1].joinpath("conftest.py").read_text().replace(PLUGINS, ""))
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.slow
        def test_slow():
            pass

        @pytest.mark.soak
        def test_long():
            pass

        def test_starts_a_command_line(run_cli):
            pass

        def test_fast(tmp_path):
            pass
        """
    )
    pytester.makeini("[pytest]\nmarkers =\n    slow: long\n    soak: longer")
    outcome = pytester.runpytest_subprocess("--fast", "-v", timeout=200)
    outcome.assert_outcomes(passed=1, deselected=3)
    outcome.stdout.fnmatch_lines(["*::test_fast PASSED*"])


def test_the_tag_is_the_tests_own(tagged: Tagged, clean_env: dict[str, str]) -> None:
    other = Tagged()
    process = subprocess.Popen(["sleep", "1000"], env={**clean_env, TAG: other.tag})
    deadline = time.monotonic() + 200
    while not other.pids() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (tagged.pids(), other.pids()) == ([], [process.pid])
    other.kill()
    process.wait(200)


PROBED = r"( *)with socket\.socket\(\) as (\w+):\n\1 {4}\2\.bind\(.*, 0\)\)\n\1 {4}.*getsockname.*\n(?!\1 {4})"


def test_what_workers_share_is_written_whole_and_ports_are_not_asked_of_the_system() -> None:
    """A module that is there in half, or a port that another connection was given meanwhile, fails at times."""
    in_part = r"\w+\.folder / \"[^\"]+\.(?:py|yaml)\"\)\.write_text\("
    for file in Path(__file__).parents[1].rglob("*.py"):
        text = file.read_text()
        assert not re.findall(in_part, text), f"{file.name}: Place.write writes what others may be reading"
        probed = re.findall(PROBED, text)
        assert not probed, f"{file.name}: ports.free_port gives ports that stay free"


def test_a_config_of_another_test_is_not_written_over(
    tmp_path: Path, tagged: Tagged, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path, tagged)
    monkeypatch.setenv("PYTEST_CURRENT_TEST", "tests/a.py::test_one (call)")
    for seed in (1, 2):
        place.config("shared", seed=seed)
    monkeypatch.setenv("PYTEST_CURRENT_TEST", "tests/b.py::test_other (call)")
    place.config("shared", seed=2)
    with pytest.raises(AssertionError, match=r"shared is the name of a config of .*test_one, too"):
        place.config("shared", seed=3)
    assert {path.name for path in tmp_path.glob("*.part")} == set()


ASKS = """
import json, os, sys
from toy import MLP
sees = [sys.argv[1:], os.getcwd(), os.environ["COLOUR"], os.getsid(0) == os.getpid(), sys.path[:3]]
print("sees", json.dumps(sees), flush=True)
print("to stderr", file=sys.stderr)
if os.environ["COLOUR"] == "red":
    os.kill(os.getpid(), 9)
class Asking(MLP):
    pass
"""


@pytest.mark.parametrize(
    ("colour", "override", "rc"), [("green", "seed=1", 0), ("blue", "model.lrr=1", 2), ("red", "seed=1", -9)]
)
def test_a_forked_process_is_what_one_of_its_own_would_be(place: Place, colour: str, override: str, rc: int) -> None:
    """By what a module of the user sees."""
    place.write("asks.py", ASKS)
    file = place.config(f"asks-{colour}", modules=["asks", "toy"], **{"model.name": "Asking"})
    found = []
    for cold in (True, False):
        words = (override, "trainer.max_epochs=1", "trainer.resume=none")
        (running,) = place.start("train", file, *words, cold=cold, env={"COLOUR": colour})
        result = running.result(200)
        sees = [line for line in result.stdout.splitlines() if line.startswith("sees ")]
        found.append((result.rc, sees, "to stderr" in result.stderr, "Traceback" in result.stderr))
    assert found[0] == found[1]
    assert found[0][0] == rc and len(found[0][1]) == (rc != 2)
