"""Hostile files, names and paths: nothing is executed, nothing leaves its folder, and one line says what is wrong."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import RunCli
from hostile import EVIL, HOSTILE, NAMES
from hypothesis import given, settings
from hypothesis import strategies as st
from whole_runs import TOY, write_config

from dtrain.config.check import check
from dtrain.config.errors import ConfigError
from dtrain.config.load import from_mapping
from dtrain.tracking.journal import Journal
from dtrain.tracking.run_folder import read_run

LISTEN = """
import json, resource, sys, time
sys.path.insert(0, "")
CALLS = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn", "exec.never",
         "shutil.rmtree", "ctypes.dlopen", "socket.connect", "socket.bind", "webbrowser.open", "pickle.find_class",
         "os.remove", "os.rename", "os.mkdir")
seen = []

def listen(event, args):
    if event in CALLS or (event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")):
        seen.append((event, repr(args)[:200]))
    elif event == "import" and args[0] in sys.stdlib_module_names and args[0] not in sys.modules:
        seen.append((event, args[0]))
"""


# ------------------------------------------------------------------------------------------------------ hostile files

TAGS = [
    "!!python/object/apply:os.system ['touch marker']",
    "!!python/object/apply:subprocess.Popen [['touch', 'marker']]",
    "!!python/object/new:os.system ['touch marker']",
    "!!python/object:os.system {}",
    "!!python/name:os.system",
    "!!python/module:antigravity",
    "!!python/tuple [1, 2]",
    "!!python/object/apply:builtins.eval ['1']",
    "!!python/object/apply:builtins.exec ['import os']",
    "!!python/object/new:type {args: [x, !!python/tuple [], {}]}",
    "!!python/bytes aGk=",
    "!<tag:yaml.org,2002:python/object/apply:os.system> ['touch marker']",
    "!!binary aGk=",
    "!!set {a, b}",
    "!!timestamp 2020-01-01",
    "!include /etc/passwd",
    "!ENV ${HOME}",
]


def hostile_files(folder: Path) -> list[str]:
    """Writes them; each must be refused."""
    texts = {f"{name}.yaml".replace(" ", "-"): text.encode() for name, text in HOSTILE.items()}
    texts |= {f"tag-{index}.yaml": f"model: {tag}\n".encode() for index, tag in enumerate(TAGS)}
    texts |= {
        "nul.yaml": b"seed: 1\nmodel: a\0b\n",
        "nothing-but-nul.yaml": bytes(5000),
        "control.yaml": b"seed: 1\nmodel: a\x1b[2Jb\n",
        "bom-inside.yaml": b"seed: 1\n\xef\xbb\xbfmodel: x\n",
        "utf-16.yaml": "seed: 1\n".encode("utf-16"),
        "utf-32.yaml": "seed: 1\n".encode("utf-32"),
        "no-utf-8.yaml": b"seed: 1\nmodel: \xff\xfe\xfd\n",
        "surrogate.yaml": b"model: \xed\xa0\x80\n",
        "cut-utf-8.yaml": b"model: \xe2\x82",
        "overlong.yaml": b"model: \xc0\xaf\n",
        "includes-itself.yaml": b"_base_: includes-itself.yaml\n",
        "includes-much.yaml": b"_base_: [" + b"includes-much-too.yaml, " * 40 + b"]\n",
        "includes-much-too.yaml": b"_base_: [" + b"seed.yaml, " * 40 + b"]\n",
        "includes-a-device.yaml": b"_base_: /dev/zero\n",
        "includes-passwd.yaml": b"_base_: ../../../../../../../../etc/passwd\n",
        "references.yaml": b"a0: [x, x]\n" + b"".join(
            f"a{n}: ['${{a{n - 1}}}', '${{a{n - 1}}}']\n".encode() for n in range(1, 40)
        ),
        "circle.yaml": b"a: ${b}\nb: ${a}\n",
        "digits.yaml": b"seed: " + b"9" * 900_000 + b"\n",
        "one-key.yaml": b"k" * 900_000 + b": 1\n",
        "large.yaml": b"k: 1\n" * (100_000_000 // 5),
    }  # fmt: skip
    (folder / "seed.yaml").write_text("seed: 1\n")
    for name, data in texts.items():
        (folder / name).write_bytes(data)
    with (folder / "sparse.yaml").open("wb") as file:
        file.truncate(100_000_000)
    return [*texts, "sparse.yaml", "/dev/zero", "/dev/tty", "/proc/self/mem", ".", "nowhere\0.yaml", "x" * 5000]


def test_a_hostile_file_executes_nothing_and_costs_little(tmp_path: Path) -> None:
    names = hostile_files(tmp_path)
    (tmp_path / "names.json").write_text(json.dumps(names))
    code = f"""{LISTEN}
import dtrain.config.check
from dtrain.config.load import load_config
from dtrain.config.errors import ConfigError
from dtrain.config.yaml12 import parse
try:
    parse("a: [", "x")  # what is imported for the first error is there
except ConfigError:
    pass
resource.setrlimit(resource.RLIMIT_AS, (2 * 2**30,) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (100, 100))
sys.addaudithook(listen)
for name in json.load(open("names.json")):
    began = time.process_time()
    try:
        config = load_config(name)
        dtrain.config.check.check(config)
        lines = ["accepted"]
    except ConfigError as error:
        lines = [str(one) for one in error.mistakes]
    print(json.dumps([name, time.process_time() - began, lines]))
peak = int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) / 1024
print(json.dumps([peak, seen]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert (done.returncode, done.stderr) == (0, "")
    *told, (peak, seen) = (json.loads(line) for line in done.stdout.splitlines())
    assert [name for name, _, _ in told] == names
    for name, seconds, lines in told:
        assert lines != ["accepted"] and all("\n" not in line and line.isprintable() for line in lines), name
        assert len(lines[0]) < 400 + len(name) and len(lines) <= 20, name
        assert seconds < 10, name  # of CPU; 2 at most on a machine of its own
    assert seen == [] and not (tmp_path / "marker").exists()
    assert peak < 500, "MB"


def test_a_byte_order_mark_is_no_attack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dtrain.config.load import load_config

    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_bytes(b"\xef\xbb\xbfseed: 1\r\n")
    assert load_config("c.yaml").seed == 1


@pytest.mark.parametrize(
    "word",
    [
        "model=!!python/object/apply:os.system ['touch marker']",
        "model=&a [*a]",
        "model=" + "[" * 3000,
        "model=a\0b",
        "model: {name: x}",
        "__class__.__init__=1",
        "model.__globals__=1",
        "=1",
        "x" * 5000 + "=1",
        "seed=" + "9" * 100_000,
        "model=\ud800",
        "modules=[os]",
        "modules=../evil",
        "trainer.checkpoint_dir=\x1b]0;owned\x07",
    ],
)
def test_a_hostile_argument_is_refused_in_lines(word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dtrain.config.load import load_config

    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text("model: {name: Linear, in_features: 1, out_features: 1}\n")
    with pytest.raises(ConfigError) as error:
        check(load_config("c.yaml", [word]))
    assert all(str(one).isprintable() and len(str(one)) < 700 for one in error.value.mistakes)
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


def test_a_hostile_file_is_one_line_and_status_2_on_the_command_line(run_cli: RunCli, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"model: {TAGS[0]}\n")
    done = run_cli(["c.yaml"])
    assert done.rc == 2 and done.stdout == ""
    assert done.stderr.startswith("c.yaml:1:8: the tag ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "marker").exists()


# ------------------------------------------------------------------------------------------------------- hostile names

PLACES: list[dict[str, Any]] = [
    {"loss": "CALL"},
    {"loss": {"name": "torch.nn.ModuleList", "modules": ["CALL"]}},
    {"optimizer": "CALL"},
    {"lr_scheduler": "CALL"},
    {"loaders": {"train": "CALL"}},
    {"loaders": {"name": "mine.Data", "transforms": ["CALL"], "train": {}}},
    {"predictor": "CALL"},
]


def test_no_hostile_name_imports_or_calls_anything_wherever_it_stands(tmp_path: Path) -> None:
    """As in test_build, for the other sections; each name in two of them."""
    (tmp_path / "evil.py").write_text(EVIL)
    (tmp_path / "mine.py").write_text(
        "class Data:\n    def __init__(self, transforms=()): self.transforms = transforms\n"
    )
    (tmp_path / "names.json").write_text(json.dumps([NAMES, PLACES]))
    code = f"""{LISTEN}
import torch, torchmetrics, dtrain.trainer, dtrain.tracking.journal, dtrain.predict.predictor
from dtrain.config.build import build
from dtrain.config.check import check
from dtrain.config.load import from_mapping
from dtrain.config.schema import calls
from dtrain.config.errors import ConfigError

def filled(value, call):
    if value == "CALL":
        return call
    if isinstance(value, dict):
        return {{key: filled(item, call) for key, item in value.items()}}
    return [filled(item, call) for item in value] if isinstance(value, list) else value

refused = 0
names, places = json.load(open("names.json"))
sys.addaudithook(listen)
for turn, name in enumerate(names):
    for place in (places[turn % len(places)], places[turn // 2 % len(places)]):
        call = {{"name": name, "command": "touch marker", "args": "touch marker", "source": "open('marker', 'w')"}}
        config = from_mapping({{"modules": ["evil", "mine"]}} | filled(place, call))
        for act in (check, lambda config: [build(config, one) for one in calls(config)]):
            try:
                act(config)
                print("BUILT", repr(name), place)
            except ConfigError as error:
                assert all(len(str(one).splitlines()) == 1 for one in error.mistakes), error
                refused += 1
print("refused", refused)
print("seen", seen)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.stderr == ""
    assert done.stdout == f"refused {2 * 2 * len(NAMES)}\nseen []\n"
    left = {path.name for path in tmp_path.iterdir()} - {"__pycache__"}
    assert left == {"evil.py", "mine.py", "names.json"}


# ------------------------------------------------------------------------------- names and paths of the config itself

WRONG_NAMES = {
    "experiment": [
        "../x",
        "a/../../x",
        "..",
        "a\nb",
        "a\rb",
        "a\0b",
        "\x1b[2J",
        "x" * 300,
        "ü" * 150,
        "a\u202eb",
        "\x7f",
    ],
    "run_name": ["a\nb", "a\0b", "\x1b[31m", "x" * 300, "a\u2028b", "\ud800"],
    "checkpoint_dir": ["a\nb", "a\0b", "x" * 300, "runs/" + "x" * 300 + "/y", "\x1b]0;x\x07", "\t"],
}
FINE_NAMES = [
    "digits",
    "/Users/me@host/digits",  # Databricks has such experiments
    "x; rm -rf ~",
    "$(touch marker) `touch marker`",
    "'quotes' \"and\" more",
    "a b  c",
    "..a",
    "-rf",
    "%n{x}$PATH",
    "Müller 🙂",
    "x" * 200,
]


def problems(key: str, name: str) -> list[str]:
    section = {"trainer": {"max_epochs": 1, key: name}} if key == "checkpoint_dir" else {key: name}
    try:
        check(from_mapping(section))
    except ConfigError as error:
        label = f"trainer.{key}" if key == "checkpoint_dir" else key
        return [str(one) for one in error.mistakes if str(one).startswith(f"{label}:")]
    return []


@pytest.mark.parametrize(("key", "name"), [(key, name) for key, names in WRONG_NAMES.items() for name in names])
def test_a_name_that_no_folder_or_line_can_hold_is_refused(key: str, name: str) -> None:
    (line,) = problems(key, name)
    assert line.isprintable() and len(line) < 250


@pytest.mark.parametrize("name", FINE_NAMES)
@pytest.mark.parametrize("key", WRONG_NAMES)
def test_odd_names_are_no_mistakes(key: str, name: str) -> None:
    assert problems(key, name) == []


@given(st.text(st.sampled_from("a/.;'\"$`()\\ \n\0~-*ü\t&|<>!#%{}"), max_size=20) | st.text(max_size=300))
@settings(max_examples=500, deadline=None)
def test_an_experiment_that_is_accepted_has_its_folder_under_runs(name: str) -> None:
    if problems("experiment", name):
        return
    folder = (Path("/base") / f"runs/{name or 'default'}").resolve()  # as create.py has it
    assert folder.is_relative_to("/base/runs") and folder != Path("/base") and "\0" not in str(folder)
    assert all(len(part.encode()) <= 255 for part in folder.parts)


@pytest.mark.timeout(600)
def test_odd_names_reach_mlflow_as_they_are_and_stay_in_the_run_folder(run_cli: RunCli, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    work = tmp_path / "work"
    work.mkdir()
    (work / "toy.py").write_text(TOY.read_text())
    experiment, run_name = "x; touch marker; $(touch marker) 'q' \"d\"", "`touch marker`' %s {0} \\n <b>"
    file = write_config(work, "c", {"experiment": experiment, "run_name": run_name, "trainer.checkpoint_dir": None})
    file = Path(file).name
    done = run_cli([file, "trainer.max_epochs=1", "mlflow.tracking_uri=sto're; x"], cwd=work)
    assert done.rc == 0, done.text
    folder = work / "runs" / experiment
    run = MlflowClient(f"sqlite:///{work}/sto're; x/mlflow.db").get_run(read_run(folder)["run_id"])
    assert run.info.run_name == run_name and run.info.status == "FINISHED"
    assert run.data.tags["dtrain.checkpoint_dir"] == str(folder)
    assert {path.name for path in work.iterdir()} <= {"c.yaml", "toy.py", "runs", "sto're; x", "__pycache__"}
    assert [path.name for path in (work / "runs").iterdir()] == [experiment]
    assert not list(tmp_path.rglob("marker"))


def test_the_hint_is_a_command_for_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dtrain.tracking import start_sender as tracking

    monkeypatch.setattr(tracking, "_sender_command", lambda *words: [sys.executable, "-c", "raise SystemExit(1)"])
    folder = tmp_path / "x; touch 'marker' $(id)"
    journal = Journal(folder, experiment="e", run_name="r", tracking_uri=str(tmp_path), exit_timeout_seconds=20)
    journal.start({}, {})
    hint = journal.finish("FINISHED")
    assert shlex.split(hint.partition("send the rest with: ")[2]) == ["dtrain", "sync", str(folder)]
