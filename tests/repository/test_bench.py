"""scripts/bench: the measurement runs on a small scale and judges all that is promised; no time decides a test."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, Tagged
from whole_runs import NO_MLFLOW, forked_from, worlds_of

BENCH = REPOSITORY / "scripts" / "bench"


@pytest.fixture(scope="module")
def bench() -> Iterator[Path]:
    sys.path.insert(0, str(BENCH))
    yield BENCH
    sys.path.remove(str(BENCH))


def overhead(arguments: list[str], env: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / "overhead.py"), *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=280)


def tables_of(printed: str) -> dict[str, dict[str, list[str]]]:
    """The cells of each table by its title and by the program."""
    found: dict[str, dict[str, list[str]]] = {}
    for block in re.findall(r"^\|.*\n\|[ -|]*\n(?:\|.*\n)+", printed, re.M):
        head, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        found[head[0]] = {cells[0]: cells[1:] for cells in lines}
    return found


@pytest.mark.slow
def test_overhead_measures_both_loops_in_turns_and_names_the_peer_that_is_missing(
    clean_env: dict[str, str], tagged: Tagged, tmp_path: Path, bench: Path
) -> None:
    from contestants import PEERS

    peer = next((peer for peer in PEERS if not peer.is_here()), None)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- overhead: begin -->\nold\n<!-- overhead: end -->\nafter\n")
    words = ["--rounds", "1", "--steps", "5", "--ranks", "1", "--datasets", "Items", "--starts", "1"]
    words += ["--only", *([peer.name] if peer else []), "--json", "all.json", "--write", "page.md"]
    done = overhead(words, clean_env | {"TMPDIR": str(tmp_path)}, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    if peer:
        assert f"not installed, left out: {peer.name} (pip install -e '.[bench]')" in done.stderr
        assert f"Not measured: {peer.name}." in done.stdout
    tables = done.stdout.partition("\n\nwhat is promised")[0]
    promised, steps, starts, features = tables_of(tables + "\n").values()
    assert [cells[-1] in ("ok", "MISS") for cells in promised.values()] == [True] * 6
    assert set(steps) == set(starts) == set(features) == {"by hand", "dtrain"}
    assert steps["by hand"][2:4] == ["1", "1"]
    assert all(float(cell.replace(",", "")) > 0 for cell in [*steps["by hand"], *steps["dtrain"]])
    assert len(re.findall(r"^(?:ok  |MISS)  one process.* <= [\d.]+( s| MB)?$", done.stdout, re.M)) == 6
    assert page.read_text() == f"before\n<!-- overhead: begin -->\n\n{tables}\n\n" + ("<!-- overhead: end -->\nafter\n")
    for run in json.loads((tmp_path / "all.json").read_text())["runs"]:
        assert len(run["turns"]) == len(run["end"]["peak_mb"]) == run["session"] == 1
        assert run["turns"][0]["step_us"] > 0 and run["end"]["left_behind"] == 0
    assert not list(tmp_path.glob("overhead-*"))
    assert tagged.pids() == []


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", [1, 2])
def test_overhead_measures_peers_bare_and_full_and_judges_every_promise(
    clean_env: dict[str, str], tagged: Tagged, tmp_path: Path, bench: Path, ranks: int
) -> None:
    from contestants import PEERS

    here = [peer.name for peer in PEERS if peer.is_here() and peer.name in ("accelerate", "Lightning Trainer")]
    words = ["--rounds", "2", "--steps", "12", "--ranks", str(ranks), "--datasets", "Items", "--only", *here, "--all"]
    command = [sys.executable, str(BENCH / "overhead.py"), *words, "--starts", "2", "--json", "all.json"]
    done = subprocess.run(command, cwd=tmp_path, env=clean_env, capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stdout + done.stderr
    _, steps, starts, features = tables_of(done.stdout).values()
    rows = {"by hand", "by hand, full", "dtrain", *(f"{name}, {how}" for name in here for how in ("bare", "full"))}
    assert set(steps) == rows
    assert set(starts) == rows | {"by hand + torchmetrics", "dtrain + torchmetrics"}
    assert set(features) == {"by hand", "dtrain", *here}
    data = json.loads((tmp_path / "all.json").read_text())
    assert len(data["verdicts"]) == 7 and data["failed"] == []
    for run in data["runs"]:
        assert len(run["end"]["peak_mb"]) == ranks
        assert run["end"]["left_behind"] == 0
    assert tagged.pids() == []


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("memory_mb", ["0", "1"])
def test_volumes_measures_both_programs_and_judges_every_promise(
    clean_env: dict[str, str], tmp_path: Path, memory_mb: str
) -> None:
    command = [sys.executable, str(BENCH / "volumes.py"), "--rounds", "1", "--count", "1", "--workers", "0"]
    command += ["--patch", "8", "32", "32", "--memory-mb", memory_mb, "--json", "all.json"]
    done = subprocess.run(command, cwd=tmp_path, env=clean_env, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = ["pipeline, 0 worker(s)", "training, 0 worker(s)", "prediction, 0 worker(s)"]
    parts += ["lazy training", "lazy prediction"] if memory_mb != "0" else []
    for part in parts:
        for program in ("pytorch3dunet", "dtrain"):
            assert re.search(rf"^{re.escape(part)}: {program} +[\d.]+ +[\d.]+ ", done.stdout, re.M), done.stdout
        assert len(re.findall(rf"^(?:ok|MISS)  +{re.escape(part)}: .* <= (?:1|20 MB)$", done.stdout, re.M)) == 1
    data = json.loads((tmp_path / "all.json").read_text())
    assert [run["program"] for run in data["runs"]] == ["pytorch3dunet", "dtrain"] * len(parts)
    assert min(min(run["samples_per_s"], run["cpu_ms"], run["peak_mb"]) for run in data["runs"]) > 0
    assert {path.name for path in tmp_path.iterdir()} == {"all.json"}


@pytest.mark.soak
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["predict.py", "--sides", "16", "--patch", "8", "--halo", "4"], r"^16\^3 halo: dtrain, 8 calls +\d"),
        (["metrics.py", "--shape", "8", "8", "8", "--cases", "foreground"], r"^foreground +\d.*(ok|MISS) <= 2%$"),
        (["pictures.py", "--patch", "8", "8", "8"], r"^(ok|MISS): all of it [\d.]+% of the epoch"),
    ],
)
def test_what_is_measured_beside_others_comes_out(
    clean_env: dict[str, str], tmp_path: Path, words: list[str], expected: str
) -> None:
    command = [sys.executable, str(BENCH / words[0]), *words[1:], "--rounds", "1", "--f-maps", "4", "8"]
    done = subprocess.run(command, cwd=tmp_path, env=clean_env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(expected, done.stdout, re.M), done.stdout
    if words[0] == "predict.py":
        assert re.search(r"^16\^3 halo: pytorch3dunet, .* [0-9]e-0[5-9]$", done.stdout, re.M), (
            done.stdout
        )  # how far away


def test_a_measurement_of_volumes_that_fails_is_an_error_and_not_a_figure(
    clean_env: dict[str, str], tmp_path: Path
) -> None:
    command = [
        sys.executable,
        str(BENCH / "volumes.py"),
        "--patch",
        "1",
        "2",
        "2",
        "--memory-mb",
        "0",
    ]  # no room for 3 levels
    done = subprocess.run(
        [*command, "--count", "0"], cwd=tmp_path, env=clean_env, capture_output=True, text=True, timeout=200
    )
    assert done.returncode != 0
    assert "samples per s" not in done.stdout


def test_programs_that_read_volumes_take_turns(bench: Path) -> None:
    from volumes import Part, schedule

    parts = [Part("a", "pipeline", 0, 1), Part("b", "prediction", 0, 1, lazy=True)]
    runs = [(number, part.name, program) for number, part, program in schedule(2, parts)]
    theirs, ours = "pytorch3dunet", "dtrain"
    assert runs == [
        (0, "a", theirs),
        (0, "a", ours),
        (0, "b", theirs),
        (0, "b", ours),
        (1, "a", ours),
        (1, "a", theirs),
    ]


def test_a_ratio_of_rates_is_one_of_times(bench: Path) -> None:
    from volumes import Part, Run, ratio, verdicts

    part, lazy = Part("a", "pipeline", 0, 1), Part("b", "prediction", 0, 1, lazy=True)
    runs = [Run("a", "pytorch3dunet", 2.0, 30.0, 60.0, 100.0), Run("a", "dtrain", 8.0, 15.0, 20.0, 120.0)]
    runs += [Run("b", "pytorch3dunet", 2.0, 30.0, 60.0, 100.0), Run("b", "dtrain", 8.0, 15.0, 20.0, 121.0)]
    assert [ratio(runs, part, name) for name in ("samples_per_s", "cpu_ms", "all_cpu_ms")] == [0.25, 0.5, 1 / 3]
    found = [(verdict.found, verdict.kept) for verdict in verdicts(runs, [part, lazy])]
    assert found == [(0.25, True), (1 / 3, True), (21.0, False)]


# A program without torch that takes its steps as workload.py's optimizer does, with a child that is busy behind it.
TRAINS = """
import os, subprocess, sys, time
from pathlib import Path
from clock import turns
def worked(pid):
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
if sys.argv[1] == "fails":
    sys.exit("no such dataset")
child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
stops, count = turns(), 0
stop = next(stops)
for step in range(1, int(sys.argv[2]) + 1):
    time.sleep(0.0001)
    begun = worked(child.pid)
    while step == 130 and worked(child.pid) < begun + 0.1:  # of which the system counts hundredths only
        time.sleep(0.01)
    if step == stop:
        Path("steps").write_text(str(step))
        stop = next(stops, 0)
child.kill()
child.wait()
sys.exit("it ended badly" if sys.argv[1] == "ends badly" else 0)
"""


def trained(how: str, steps: int, folder: Path, env: dict[str, str]) -> Any:
    from turns import Program

    folder.mkdir()
    env = env | {"PYTHONPATH": str(BENCH)}
    return Program([sys.executable, "-c", TRAINS, how, str(steps)], 1, env, folder)


def test_a_program_works_only_in_its_turns(
    bench: Path, clean_env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tagged: Tagged
) -> None:
    import turns

    monkeypatch.setattr(turns, "MOST_QUIET_SECONDS", 0.0)  # it never is
    one, other = (trained("well", 145, tmp_path / name, clean_env) for name in ("a", "b"))
    try:
        assert one.start().first_step_s > 0
        other.start()
        states = [process.status() for program in (one, other) for process in program.tree]
        assert states == ["stopped"] * 4  # two programs, each with a child
        figures = one.turn(15)
        assert figures.step_us > 100 and figures.step_us > figures.step_cpu_us > 0, "a sleep takes no processor"
        assert [(tmp_path / name / "steps").read_text() for name in ("a", "b")] == ["125", "100"]
        assert [process.status() for process in one.tree] == ["stopped"] * 2
        other.turn(30)
        one.turn(5)
        ends = [one.end(), other.end()]
        assert [end.left_behind for end in ends] == [0, 0]
        assert min(end.peak_mb[0] for end in ends) > 1
        assert ends[0].tree_cpu_us > figures.step_cpu_us  # its child was busy, too
    finally:
        one.close()
        other.close()
    assert tagged.pids() == [] and not (tmp_path / "a").exists()


@pytest.mark.parametrize(("how", "text"), [("fails", "no such dataset"), ("ends badly", "it ended badly")])
def test_a_broken_run_is_an_error_and_not_a_figure(
    bench: Path, clean_env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, text: str
) -> None:
    import turns

    monkeypatch.setattr(turns, "MOST_QUIET_SECONDS", 0.0)
    program = trained(how, 110, tmp_path / "a", clean_env)
    try:
        with pytest.raises(turns.ProgramError, match=f"(?s)exit status 1.*{text}"):
            program.start()
            program.end()
    finally:
        program.close()


def test_a_peer_that_fails_is_left_out_and_named(bench: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from contestants import BARE, DTRAIN, FULL, PEERS, Contestant
    from overhead import Bench, Entry, Measurement
    from turns import ProgramError

    class Broken:
        def close(self) -> None:
            closed.append(1)

    closed: list[int] = []
    peer = Contestant(PEERS[0], BARE)
    entry = Entry(peer, Broken(), Measurement(peer.label, 1, "Items", 1))  # type: ignore[arg-type]
    found = Bench(steps=1)
    with found._failures_of(entry):
        raise ProgramError("exit status 3")
    assert found.failed == ["accelerate, bare, one process, Items"] and closed == [1]
    assert "FAILED and is left out: exit status 3" in capsys.readouterr().err
    own = Contestant(DTRAIN, FULL)
    entry = Entry(own, Broken(), Measurement(own.label, 1, "Items", 1))  # type: ignore[arg-type]
    with pytest.raises(SystemExit, match="dtrain, one process"), found._failures_of(entry):
        raise ProgramError("exit status 3")


def test_both_loops_use_the_same_dataset_model_and_clock() -> None:
    import yaml

    config = yaml.safe_load((BENCH / "overhead.yaml").read_text())
    tree = ast.parse((BENCH / "by_hand.py").read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert {config["model"]["name"], config["optimizer"]["name"], config["metrics"]["name"]} <= names
    calls = {ast.unparse(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    given = {item.arg: ast.unparse(item.value) for item in calls["DataLoader"].keywords}
    assert given["batch_size"] == str(config["loaders"]["batch_size"])
    assert {"name", "batch_size", "train", "val"} == set(config["loaders"])  # no option that the other loop lacks
    rate = {item.arg: ast.literal_eval(item.value) for item in calls["ClockedSGD"].keywords}
    assert rate == {key: value for key, value in config["optimizer"].items() if key != "name"}


def test_all_peers_train_the_same(bench: Path) -> None:
    """The same model, optimizer, rate and batch; those of the hand-written loop are compared above."""
    from contestants import FEATURES, PEERS

    assert sorted(BENCH.glob("peers/*.py")) == sorted(BENCH / peer.file for peer in PEERS)
    for peer in PEERS:
        tree = ast.parse((BENCH / peer.file).read_text())
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert {"MLP", "ClockedSGD", "workload"} <= names
        given = [(node.arg, node.value) for node in ast.walk(tree) if isinstance(node, ast.keyword)]
        mappings = [node for node in ast.walk(tree) if isinstance(node, ast.Dict)]
        pairs = [pair for node in mappings for pair in zip(node.keys, node.values, strict=True)]
        given += [(key.value, value) for key, value in pairs if isinstance(key, ast.Constant)]
        rates = {ast.unparse(value) for key, value in given if key == "lr"}
        sizes = {ast.unparse(value) for key, value in given if key == "batch_size"}
        assert rates == {"0.01"}, peer.name
        assert sizes <= {"32", "32 * idist.get_world_size()"} and sizes, peer.name  # Ignite's is that of all ranks
        assert len(peer.has) == len(FEATURES)


def test_a_verdict_is_missed_above_its_limit_and_where_nothing_was_found(bench: Path) -> None:
    from overhead import Verdict

    assert [Verdict("x", found, 1.05).kept for found in (1.0, 1.05, 1.06, float("nan"))] == [True, True, False, False]
    assert Verdict("x", 2.0, 1.05, " s").line().split() == ["MISS", "x", "2.00", "<=", "1.05", "s"]


def test_programs_take_turns_and_none_is_always_first(bench: Path) -> None:
    from overhead import in_turn

    orders = ["".join(in_turn(list("abc"), number)) for number in range(6)]
    assert orders == ["abc", "cba", "bca", "acb", "cab", "bac"]


def test_a_program_is_compared_with_the_loop_of_its_own_session_and_round(bench: Path) -> None:
    from overhead_tables import End, Measurement, Start, Turn, rows, start_table, steps_table, verdicts

    def run(label: str, session: int, times_us: list[float], start_s: float, peak_mb: float) -> Measurement:
        turns = [Turn(us, us / 2) for us in times_us]
        return Measurement(label, 1, "Items", session, Start(start_s, 2.0), turns, End([peak_mb], 1.0, 1.0, 200.0, 0))

    # The machine slows down: within the first session, and before the second one, which starts twice as late.
    runs = [run("by hand", 1, [100, 200], 2.0, 300), run("dtrain", 1, [110, 240], 2.4, 320)]
    runs += [run("by hand", 2, [400], 4.0, 330), run("dtrain", 2, [520], 5.0, 370)]
    found = [(round(verdict.found, 3), verdict.kept) for verdict in verdicts(runs)]
    assert found == [(1.2, False), (1.2, False), (0.7, False), (30.0, False), (200.0, True), (0.0, True)]
    programs = rows(runs, 1, "Items")
    assert steps_table(programs, "x").splitlines()[-1] == "| dtrain | 240 | 120 | 1.20 | 1.20 | 1 |"
    assert start_table(programs, "x").splitlines()[-1] == "| dtrain | 3.70 | +0.70 | 2.00 | 345 | +30 | 2 |"


def test_figures_of_an_earlier_run_come_into_the_tables(bench: Path, clean_env: dict[str, str], tmp_path: Path) -> None:
    def run(label: str, session: int, ranks: int) -> dict[str, Any]:
        turns = [{"step_us": 100.0 * ranks, "step_cpu_us": 90.0}]
        end = {"peak_mb": [300.0] * ranks, "tree_cpu_us": 95.0, "end_s": 1.0, "sender_mb": 200.0, "left_behind": 0}
        return {"label": label, "ranks": ranks, "dataset": "Items", "session": session, "turns": turns, "end": end,
                "start": {"first_step_s": 2.0, "first_step_cpu_s": 2.0}}  # fmt: skip

    for ranks in (1, 2):
        runs = [run(label, 1, ranks) for label in ("by hand", "dtrain", *(["Ignite, full"] if ranks == 2 else []))]
        (tmp_path / f"{ranks}.json").write_text(json.dumps({"about": f"machine {ranks}", "runs": runs}))
    done = overhead(["--ranks", "--add", "1.json", "2.json", "--only"], clean_env, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("Measured: machine 1; machine 2.\n")
    _, one, two, *_, features = tables_of(done.stdout).values()
    assert (one["dtrain"][0], two["dtrain"][0], two["Ignite, full"][2]) == ("100", "200", "1.00")
    assert list(features) == ["by hand", "dtrain", "Ignite"]


def test_tables_go_between_the_markers_of_a_page(bench: Path, tmp_path: Path) -> None:
    from overhead_tables import write_between

    page = tmp_path / "page.md"
    page.write_text("a\n<!-- one: begin -->\nold\n<!-- one: end -->\nb\n")
    write_between(page, "one", "new")
    assert page.read_text() == "a\n<!-- one: begin -->\n\nnew\n\n<!-- one: end -->\nb\n"
    with pytest.raises(ValueError, match="has no lines <!-- two: begin -->"):
        write_between(page, "two", "new")
    for text in (REPOSITORY / "docs" / "performance.md").read_text().split("```")[::2]:
        assert text.count("<!-- overhead: begin -->") == text.count("<!-- overhead: end -->")


def test_peak_memory_is_the_process_own_and_not_its_parents(bench: Path) -> None:
    """getrusage would give the child what this process held when it forked."""
    block = bytearray(os.urandom(1) * 150_000_000)
    code = "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n" + peak_mb_source()
    code += "\nprint(peak_mb('self'))"
    child = subprocess.run([sys.executable, "-c", code, str(bench)], capture_output=True, text=True, timeout=200)
    assert 1 < float(child.stdout) < 100, child.stderr
    assert len(block) == 150_000_000


def peak_mb_source() -> str:
    """The function alone: what its module imports takes memory, too."""
    tree = ast.parse((BENCH / "clock.py").read_text())
    return next(ast.unparse(node) for node in tree.body if getattr(node, "name", "") == "peak_mb")


@pytest.mark.soak
def test_checkpoint_measures_the_stall_against_the_copy_and_judges_it(
    clean_env: dict[str, str], tmp_path: Path
) -> None:
    command = [sys.executable, str(BENCH / "checkpoint.py"), "--parameters", "1000000", "--checkpoints", "3"]
    command += ["--rounds", "1"]
    done = subprocess.run(
        [*command, "--json", "all.json"], cwd=tmp_path, env=clean_env, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^(ok  |MISS)  a checkpoint's stall / the bare copy .* <= 1\.05$", done.stdout, re.M)
    data = json.loads((tmp_path / "all.json").read_text())
    assert [one["step"] for one in data["checkpoints"]] == [4, 8, 12]
    assert min(one["copy_s"] for one in data["checkpoints"]) > 0
    sizes = {one["way"]: one["read_mb"] for one in data["readings"]}
    assert sizes["dtrain"] < sizes["one reading"] + 0.1, "each byte is read once"
    assert {path.name for path in tmp_path.iterdir()} == {"all.json"}


@pytest.mark.slow
def test_shards_measures_ranks_that_save_their_shards_and_resume(
    bench: Path, clean_env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A smallest rehearsal of one form; ranks come from a process that has imported torch, not from `dtrain launch`."""
    import shards

    (tmp_path / "stubs" / "mlflow").mkdir(parents=True)
    (tmp_path / "stubs" / "mlflow" / "__init__.py").write_text(NO_MLFLOW)

    def launched(command: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
        words = command[command.index("launch") + 1 :]
        assert words[:2] == ["--nproc-per-node", "2"]
        env = clean_env | more["env"]
        env["PYTHONPATH"] = f"{tmp_path / 'stubs'}:{env['PYTHONPATH']}"  # its import takes seconds
        files = [(tmp_path / f"{rank}.out", tmp_path / f"{rank}.err") for rank in range(2)]
        ranks = [
            forked_from().start(["-m", "dtrain", "train", *words[2:]], more["cwd"], env | world, *output)
            for world, output in zip(worlds_of(2), files, strict=True)
        ]
        status = max(abs(rank.wait(200)) for rank in ranks)
        return subprocess.CompletedProcess(command, status, files[0][0].read_text(), files[0][1].read_text())

    monkeypatch.setattr(subprocess, "run", launched)
    monkeypatch.setattr(sys, "argv", ["shards.py", "--parameters", "20000", "--ranks", "2", "--checkpoints", "1"])
    found = shards.measure("sharded", shards.wishes(), tmp_path)
    assert len(found) == 2
    for rank in found:
        assert set(rank["gaps"]) == {"1", "2", "3"} and min(rank["gaps"].values()) > 0
        assert rank["resumed_mb"] > 0 and 0 < rank["before_mb"] <= rank["peak_mb"]
    text = shards.told("sharded", found)
    assert re.match(r"sharded  stops the loop for -?[\d.]+ s; written [\d.]+ s later\n", text) and "resuming" in text


@pytest.mark.slow
def test_agreement_measures_both_forms_in_namespaces_and_simulates_them(
    clean_env: dict[str, str], tmp_path: Path, machines: object
) -> None:
    """The smallest case there is; `machines` skips it where there are no network namespaces."""
    words = ["--cases", "2x1", "--delay-us", "100", "--turns", "1", "--fit", "1", "--json", "all.json"]
    code = f"import sys; sys.path.insert(0, {str(BENCH)!r}); sys.argv[1:] = {words!r}; "
    files = tmp_path.with_name(f"{tmp_path.name}.out"), tmp_path.with_name(f"{tmp_path.name}.err")
    process = forked_from().start(["-c", f"{code}import agreement; agreement.main()"], tmp_path, clean_env, *files)
    status = process.wait(200)
    text = "".join(file.read_text() for file in files)
    assert status == 0, text
    assert re.search(r"^2x1( +[\d.]+){4}$", text, re.M), text
    case = json.loads((tmp_path / "all.json").read_text())["cases"]["2x1"]
    kinds = {f"{what} {form}" for what in ("sum", "gather", "broadcast", "vote") for form in ("by node", "flat")}
    assert kinds < case.keys() and min(case[kind] for kind in kinds) > 0
    assert min(case[f"simulated {form}"] for form in ("by node", "flat")) > 0
    assert {path.name for path in tmp_path.iterdir()} == {"all.json"}
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, timeout=200, check=True).stdout
    assert "agree-" not in left


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_shards_prints_both_forms(clean_env: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "shards.py"), "--parameters", "200000", "--ranks", "2", "--checkpoints", "1"]
    done = subprocess.run(
        [*command, "--json", "all.json"], cwd=tmp_path, env=clean_env, capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^(sharded|full) +stops the loop for", done.stdout, re.M) == ["sharded", "full"]
    assert {path.name for path in tmp_path.iterdir()} == {"all.json"}


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_scale_measures_sampler_ranks_and_journal(clean_env: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "scale.py"), "--ranks", "2", "--samples", "100000000", "--steps", "20"]
    done = subprocess.run(
        [*command, "--json", "all.json"], cwd=tmp_path, env=clean_env, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads((tmp_path / "all.json").read_text())
    assert [one["samples"] for one in data["sampler"]] == [10**6, 10**8]
    assert max(one["peak_mb"] for one in data["sampler"]) < 8  # a permutation of the largest would take 800
    assert [one["ranks"] for one in data["together"]] == [2]
    assert min(data["together"][0].values()) > 0
    assert data["journal"]["lines"] >= 1
    assert {path.name for path in tmp_path.iterdir()} == {"all.json"}


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_outage_takes_the_server_away_and_back_and_judges_the_steps(clean_env: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "outage.py"), "--rounds", "1", "--seconds", "1", "--json", "all.json"]
    done = subprocess.run(command, cwd=tmp_path, env=clean_env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"^(?:ok  |MISS)  .*server (?:frozen|killed)", done.stdout, re.M)) == 6
    data = json.loads((tmp_path / "all.json").read_text())
    assert [span["server"] for span in data["spans"]] == ["there", "frozen", "there", "killed", "there"]
    assert min(span["steps"] for span in data["spans"]) > 0 and data["hint"] == ""
    assert {path.name for path in tmp_path.iterdir()} == {"all.json"}


def test_an_outage_is_compared_with_the_spans_before_and_after(bench: Path) -> None:
    from outage import Span, ratios

    kinds = [("there", 2.0), ("frozen", 3.0), ("there", 4.0), ("killed", 3.0), ("there", 2.0), ("frozen", 6.0)]
    spans = [Span(kind, 0, 1, step_us=time) for kind, time in [*kinds, ("there", 4.0)]]
    assert ratios(spans, "frozen", "step_us") == [1.0, 2.0]
    assert ratios(spans, "killed", "step_us") == [1.0]


def test_the_simulation_of_a_few_messages_is_what_a_hand_counts(bench: Path) -> None:
    import simulate
    from simulate import Network, by_node, ring

    ways = Network(between_us=10, inside_us=1, wake_us=0, message_us=0, call_us=0, handover_us=0, gb_per_s=1e9)
    # Rank 0 says that it is ready (10), rank 2 sends what it has of rank 3 meanwhile (10), and the sum goes to rank 2
    # (10) and from there to rank 3 (1); the same between two nodes of one rank.
    assert [round(1e3 * by_node(nodes, ways, rounds=1).ms, 3) for nodes in ([0, 0, 1, 1], [0, 1])] == [31, 30]
    assert by_node([0, 0, 1, 1], ways, rounds=1).messages == 6  # one up and one down for each rank but rank 0
    # A ring of one number: each of n ranks but one adds, each but one hears, and the first was not ready before.
    for ranks in (2, 4, 7):
        found = simulate.Simulation(simulate.sum_in_ring(ranks, numbers=1), [0] * ranks, ways).run()
        assert (round(1e3 * found.ms, 3), found.messages) == (2 * (ranks - 1) + 1, 2 * (ranks - 1))
    assert ring([0] * 7, ways).messages == 3 * 12  # three numbers, each on its own
    # Two ranks and no way at all: a message is three, each written and taken by a processor for 2 us. Rank 1 takes
    # "ready", then writes the data, which rank 0 has at 10; what comes back takes three of the 2 us.
    busy = Network(between_us=0, inside_us=0, wake_us=0, message_us=2, call_us=0, handover_us=0)
    found = by_node([0, 0], busy, rounds=1)
    assert (round(1e3 * found.ms, 3), found.busy_us) == (16, 12)
    assert round(1e3 * by_node([0, 0], busy._replace(cores=1), rounds=1).ms, 3) == 24  # both ranks' work in turn
    # A gather of 1,000 bytes of each rank, of which each takes a microsecond into rank 0's node.
    slow = ways._replace(between_us=0, inside_us=0, gb_per_s=1e-3)
    gathered = simulate.Simulation(
        simulate.gather_by_node([[1, 2], [], [3], []], 1000), [0, 0, 1, 1], slow
    ).run()  # rank 2's head of 1,024 bytes, and what two ranks have
    assert round(1e3 * gathered.ms, 3) == simulate.HEAD_BYTES + 2000


@pytest.mark.soak
def test_training_on_a_gpu_is_rehearsed_on_a_cpu(clean_env: dict[str, str], tmp_path: Path) -> None:
    command = ["bash", str(BENCH / "gpu.sh"), "--device", "cpu", "--scale", "small", "--steps", "2", "--rounds", "2"]
    command += ["--no-compile", "--json", "all.json"]
    env = {**clean_env, "PYTHON": sys.executable}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "all.json").read_text())["figures"]
    for work in ("unet3d", "pidnet-s"):
        assert [one["program"] for one in figures[f"{work}, plain"]] == ["by hand", "dtrain", "dtrain", "by hand"]
        assert re.search(rf"^(ok  |MISS)  {work}, plain: dtrain / by hand .* <= 1\.0101$", done.stdout, re.M)
    assert figures["published"].keys() == {"pytorch3dunet", "dtrain"}


def test_a_device_idles_where_no_kernel_is_at_work(bench: Path) -> None:
    from gpu_parts import idle_share

    assert idle_share([(0, 10), (10, 20)]) == 0
    assert idle_share([(20, 30), (0, 10), (5, 8)]) == pytest.approx(
        1 / 3
    )  # one within another, and a third after a gap
    assert idle_share([]) == 1


def test_a_clock_times_the_steps_between_its_edges_alone(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_parts

    seconds = iter([1.0, 1.5])
    monkeypatch.setattr(gpu_parts.time, "perf_counter", lambda: next(seconds))
    clock = gpu_parts.Clock("cpu", warm_up=2, steps=10, traced=0)
    with pytest.raises(RuntimeError, match="0 steps were taken, expected 12"):
        clock.figures()
    for _ in range(15):
        clock.tick()
    figures = clock.figures()
    assert figures["step_ms"] == pytest.approx(50) and figures["idle"] is None
