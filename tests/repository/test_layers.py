"""The rules of the house, read off the source: who may know whom, what may be imported where, and how long things are.

A room is one module of dtrain/; `components` counts as one. A new room takes its place in LAYERS or HELPERS below.
"""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "dtrain"

GET_ROOMS = ("modelloader", "dataloader", "loss", "metrics", "optimizer")
# From top to bottom: a room may import what lies in the layers below its own.
LAYERS = (
    ("__main__",),
    ("cli",),
    ("worker", "launcher", "submit", "doctor"),
    ("create",),
    ("trainer",),
    ("predict",),
    (*GET_ROOMS, "checkpoint", "tracking", "sender", "progress"),
    ("build", "distributed"),
    ("config", "batch", "interrupt", "rng"),  # these know nobody
)
# A room that was divided for its size: the part lies in its owner's layer and may know its owner and the other parts.
HELPERS = {
    **dict.fromkeys(("annotations", "check", "locate", "sections", "source"), "build"),
    **dict.fromkeys(("address", "codestate", "redact", "runfiles"), "tracking"),
    **dict.fromkeys(("evaluation", "record", "rehearsal", "report", "resume", "saving", "state"), "trainer"),
    **dict.fromkeys(("failure", "pace", "replay", "watch"), "trainer"),
    **dict.fromkeys(("drawing", "panel", "pictures"), "trainer"),
    **dict.fromkeys(("agent", "console"), "launcher"),
    **dict.fromkeys(("board", "calm", "launched", "shards", "vote"), "distributed"),
    **dict.fromkeys(("delivery", "emptystore"), "sender"),
    **dict.fromkeys(("desk", "grid", "items", "outputs", "parts", "segments", "stitch"), "predict"),
    "inference": "trainer",
    "rows": "progress",
    **dict.fromkeys(("codecopy", "job", "jobscript"), "submit"),
    "snapshot": "checkpoint",
    "stacks": "dataloader",
    **dict.fromkeys(("dialect", "yamlfile"), "config"),
}
# Within one layer nobody knows anybody, but the sender reads the journal.
SIDEWAYS = {("sender", "tracking")}

RANK_VARIABLES = {
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS", "SLURM_NPROCS"),
    *("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_RANK", "PMI_SIZE"),
}
MAX_FUNCTION_LINES = 60  # less the docstring, so that nobody saves on that
MAX_FILE_LINES = 500
MACHINE_PATH = re.compile(rf"(?<![\w.~$}}-])/(?:root|home|Users|opt|mnt|media)/\w|{re.escape(str(PACKAGE.parent))}\b")


class Import(NamedTuple):
    """One imported name: `from a.b import c` in line 3 is ("a.b.c", 3, ...)."""

    name: str
    line: int
    at_start: bool  # executed when the module is imported
    for_types: bool = False  # never executed: for the type checker

    def is_of(self, package: str) -> bool:
        return self.name == package or self.name.startswith(package + ".")


class Source(NamedTuple):
    """One file of the package."""

    path: Path
    text: str
    tree: ast.Module

    @property
    def room(self) -> str:
        first = self.path.relative_to(PACKAGE).parts[0]
        return first.removesuffix(".py")

    @property
    def module(self) -> str:
        parts = self.path.relative_to(PACKAGE.parent).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def at(self, line: int) -> str:
        return f"{self.path.relative_to(PACKAGE.parent)}:{line}"


def source(path: Path, text: str) -> Source:
    return Source(path, text, ast.parse(text, path.name))


def package() -> list[Source]:
    return [source(path, path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))]


def engine() -> list[Source]:
    return [file for file in package() if file.room != "components"]


def imports(file: Source) -> list[Import]:
    """All imports of a file, those within functions and those for the type checker included."""
    return list(_imports(file.tree, file, at_start=True))


def _imports(node: ast.AST, file: Source, at_start: bool, for_types: bool = False) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, node.lineno, at_start, for_types) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = _absolute(node, file)
        yield from (Import(f"{base}.{alias.name}", node.lineno, at_start, for_types) for alias in node.names)
    elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "builtins.__import__"):
        yield Import("importlib", node.lineno, at_start)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        at_start = False
    for child in ast.iter_child_nodes(node):
        only_for_types = isinstance(node, ast.If) and child in node.body and "TYPE_CHECKING" in ast.unparse(node.test)
        yield from _imports(child, file, at_start and not only_for_types, for_types or only_for_types)


def _absolute(node: ast.ImportFrom, file: Source) -> str:
    if not node.level:
        return node.module or ""
    package_parts = file.module.split(".") if file.path.name == "__init__.py" else file.module.split(".")[:-1]
    base = package_parts[: len(package_parts) - node.level + 1]
    return ".".join([*base, node.module] if node.module else base)


def rooms_known(file: Source) -> list[tuple[str, Import]]:
    """The rooms a file imports. The package itself, `dtrain`, is no room: it only holds the version (tested below)."""
    known = ((one.name.split("."), one) for one in imports(file) if one.is_of("dtrain"))
    named = [(parts[1], one) for parts, one in known if len(parts) > 1]
    return [(room, one) for room, one in named if (PACKAGE / room).is_dir() or (PACKAGE / f"{room}.py").exists()]


def layer(room: str) -> int:
    room = HELPERS.get(room, room)
    return next(depth for depth, rooms in enumerate(LAYERS) if room in rooms)


def may_know(knower: str, known: str) -> bool:
    if layer(known) != layer(knower):
        return layer(known) > layer(knower)
    families = HELPERS.get(knower, knower), HELPERS.get(known, known)
    return families[0] == families[1] or families in SIDEWAYS


def rank_variables(file: Source) -> list[tuple[str, int]]:
    """Where a rank variable's name stands as a text of its own (in a docstring's sentence it does not)."""
    constants = (node for node in ast.walk(file.tree) if isinstance(node, ast.Constant))
    return [(node.value, node.lineno) for node in constants if node.value in RANK_VARIABLES]


def function_lengths(file: Source) -> Iterator[tuple[str, int, int]]:
    """(name, line, lines without the docstring) of each function."""
    for node in ast.walk(file.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if ast.get_docstring(node, clean=False) is not None:
                first = node.body[0]
                length -= (first.end_lineno or first.lineno) - first.lineno + 1
            yield node.name, node.lineno, length


def cycles(graph: dict[str, set[str]]) -> list[str]:
    """The members of every cycle: who can be reached from himself."""

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        waiting = list(graph.get(start, ()))
        while waiting:
            if (name := waiting.pop()) not in found:
                found.add(name)
                waiting.extend(graph.get(name, ()))
        return found

    return sorted(name for name in graph if name in reached(name))


# Who may know whom


def test_every_room_of_the_design_is_there() -> None:
    expected = {room for rooms in LAYERS for room in rooms} | HELPERS.keys() | {"__init__", "components"}
    assert expected - {file.room for file in package()} == set()


def test_every_room_has_its_place_in_the_order() -> None:
    placed = {room for rooms in LAYERS for room in rooms} | HELPERS.keys() | {"__init__"}
    assert {file.room for file in engine()} - placed == set(), "put a new room into LAYERS, or a part into HELPERS"


def test_imports_go_downwards_only() -> None:
    placed = {room for rooms in LAYERS for room in rooms} | HELPERS.keys()
    upwards = [
        f"{file.at(one.line)} {file.room} imports {room}"
        for file in engine()
        for room, one in rooms_known(file)
        if {file.room, room} <= placed and not may_know(file.room, room)
    ]
    assert upwards == []


def test_the_get_rooms_never_import_one_another() -> None:
    assert not any(may_know(one, other) for one in GET_ROOMS for other in GET_ROOMS if one != other)


def test_there_is_no_import_cycle() -> None:
    graph: dict[str, set[str]] = {}
    for file in engine():
        graph.setdefault(file.room, set()).update(room for room, one in rooms_known(file) if not one.for_types)
    assert cycles(graph) == []


def test_components_import_no_engine_room() -> None:
    files = [file for file in package() if file.room == "components"]
    assert files, "there are no components"
    foreign = [
        f"{file.at(one.line)} {one.name}"
        for file in files
        for one in imports(file)
        if one.is_of("dtrain") and not one.is_of("dtrain.components")
    ]
    assert foreign == []


def test_the_engine_knows_components_by_name_only() -> None:
    known = [file.at(one.line) for file in engine() for room, one in rooms_known(file) if room == "components"]
    assert known == []


def test_rooms_take_nothing_but_the_version_from_the_package_itself() -> None:
    taken = []
    for file in engine():
        if file.room in ("__init__", "__main__"):
            continue
        rooms = {one.line for _, one in rooms_known(file)}
        names = [one.name.split(".") for one in imports(file) if one.is_of("dtrain") and one.line not in rooms]
        taken += [(file.room, parts[1]) for parts in names if len(parts) > 1]
        values = (node for node in ast.walk(file.tree) if isinstance(node, ast.Attribute))
        taken += [(file.room, node.attr) for node in values if ast.unparse(node.value) == "dtrain"]
    allowed = {path.stem for path in PACKAGE.iterdir()} | {"__version__"}
    assert [(room, name) for room, name in taken if name not in allowed] == []


# Who may import what


def importers(name: str) -> dict[str, list[str]]:
    """Room -> the places where it imports a package."""
    found: dict[str, list[str]] = {}
    for file in package():
        for one in imports(file):
            if one.is_of(name):
                found.setdefault(file.room, []).append(file.at(one.line))
    return found


@pytest.mark.parametrize(("name", "owner"), [("importlib", "build"), ("mlflow", "sender")])
def test_one_room_alone_imports(name: str, owner: str) -> None:
    found = importers(name)
    assert owner in found, f"{owner} no longer imports {name}: does this rule still hold?"
    assert {room: places for room, places in found.items() if room != owner} == {}


def test_only_distributed_names_rank_variables() -> None:
    found = [(file.room, name, file.at(line)) for file in package() for name, line in rank_variables(file)]
    assert "distributed" in {room for room, _, _ in found}
    assert [(name, place) for room, name, place in found if room != "distributed"] == []


def test_what_lies_behind_the_get_rooms_takes_plain_values() -> None:
    plain = {"checkpoint", "tracking", "sender", "progress", "distributed", "batch", "rng", "interrupt", "components"}
    found = importers("ml_collections")
    assert {room: places for room, places in found.items() if HELPERS.get(room, room) in plain} == {}


LIGHT = {
    "config": (),
    "build": (),
    "cli": ("rich",),
    "tracking": ("rich",),
    "progress": ("rich",),
}
HEAVY = ("torch", "accelerate", "torchmetrics", "mlflow", "sklearn")


def loaded_by(code: str, *arguments: str) -> set[str]:
    """The top-level packages that a fresh interpreter has loaded after the code."""
    ending = "\nimport json, sys\nprint('LOADED', json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", code + ending, *arguments],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.rpartition("LOADED")[2]))


@pytest.mark.parametrize("room", LIGHT)
def test_a_light_room_imports_nothing_heavy_at_its_start(room: str) -> None:
    written = [one for file in package() if file.room == room for one in imports(file) if one.at_start]
    assert [one.name for one in written if any(one.is_of(name) for name in (*HEAVY, *LIGHT[room]))] == []
    assert loaded_by(f"import dtrain.{room}") & {*HEAVY, *LIGHT[room]} == set()


def test_importing_dtrain_imports_neither_torch_nor_mlflow() -> None:
    loaded = loaded_by("import dtrain")
    assert "dtrain" in loaded
    assert loaded & {*HEAVY, "rich"} == set()


def test_help_imports_neither_torch_nor_rich_nor_mlflow() -> None:
    code = """
import runpy, sys
sys.argv = ["dtrain", "--help"]
try:
    runpy.run_module("dtrain", run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code, end.code
"""
    assert loaded_by(code) & {*HEAVY, "rich", "ml_collections", "numpy"} == set()


# How things read


def test_every_module_says_what_it_is() -> None:
    assert [file.at(1) for file in package() if not ast.get_docstring(file.tree)] == []


def test_every_room_says_what_it_does_not_know() -> None:
    limits = re.compile(r"\b(no|not|nothing|nobody|never|none|without|only|alone)\b", re.IGNORECASE)
    rooms = [file for file in engine() if not file.room.startswith("__")]
    assert [file.at(1) for file in rooms if not limits.search(ast.get_docstring(file.tree) or "")] == []


def test_functions_fit_on_a_screen() -> None:
    long = [
        f"{file.at(line)} {name}: {length} lines"
        for file in package()
        for name, line, length in function_lengths(file)
        if length > MAX_FUNCTION_LINES
    ]
    assert long == []


def test_files_are_short() -> None:
    lengths = {file.at(1): len(file.text.splitlines()) for file in package()}
    assert {place: length for place, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_nothing_names_a_path_of_one_machine() -> None:
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    lines = [(path, number, line) for path in files for number, line in enumerate(path.read_text().splitlines(), 1)]
    assert [f"{path.name}:{number} {line}" for path, number, line in lines if MACHINE_PATH.search(line)] == []


# The readers above see what they are there to see


def sample(text: str, name: str = "trainer.py") -> Source:
    return source(PACKAGE / name, text)


@pytest.mark.parametrize(
    ("text", "name", "at_start"),
    [
        ("import mlflow.entities", "mlflow.entities", True),
        ("import os, mlflow", "mlflow", True),
        ("from mlflow import MlflowClient", "mlflow.MlflowClient", True),
        ("def f():\n    import mlflow", "mlflow", False),
        ("try:\n    import mlflow\nexcept ImportError:\n    pass", "mlflow", True),
        ("class A:\n    import mlflow", "mlflow", True),
        ("if TYPE_CHECKING:\n    import mlflow", "mlflow", False),
        ("if not TYPE:\n    pass\nelse:\n    import mlflow", "mlflow", True),
        ("x = __import__('mlflow')", "importlib", True),
        ("from . import config", "dtrain.config", True),
        ("from .config import load_config", "dtrain.config.load.load_config", True),
    ],
)
def test_every_way_to_import_is_seen(text: str, name: str, at_start: bool) -> None:
    assert [(one.name, one.at_start) for one in imports(sample(text)) if one.name != "os"] == [(name, at_start)]


def test_relative_imports_of_packages_are_resolved() -> None:
    inside = sample("from .vit import ViT\nfrom ... import trainer", "components/models/__init__.py")
    assert [one.name for one in imports(inside)] == ["dtrain.components.models.vit.ViT", "dtrain.trainer"]
    assert inside.room == "components"


@pytest.mark.parametrize(
    "text",
    ["os.environ['RANK']", "os.environ.get('RANK', 0)", "os.getenv('RANK')", "'RANK' in os.environ", "NAME = 'RANK'"],
)
def test_every_way_to_name_a_rank_variable_is_seen(text: str) -> None:
    assert rank_variables(sample(f'"""Knows no RANK."""\n{text}')) == [("RANK", 2)]


@pytest.mark.parametrize(
    ("knower", "known", "allowed"),
    [
        ("cli", "config", True),
        ("trainer", "loss", True),
        ("sender", "tracking", True),
        ("delivery", "runfiles", True),
        ("worker", "create", True),
        ("build", "source", True),
        ("source", "build", True),
        ("sections", "yamlfile", True),
        ("loss", "metrics", False),
        ("config", "build", False),
        ("create", "worker", False),
        ("tracking", "sender", False),
        ("runfiles", "delivery", False),
        ("distributed", "build", False),
        ("distributed", "sections", False),
        ("yamlfile", "sections", False),
    ],
)
def test_the_order_allows_and_forbids(knower: str, known: str, allowed: bool) -> None:
    assert may_know(knower, known) is allowed


def test_a_cycle_is_seen() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c"]
    assert cycles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_a_function_is_measured_without_its_docstring() -> None:
    text = 'def f():\n    """One.\n\n    Two.\n    """\n    x = 1\n    return x\n'
    assert list(function_lengths(sample(text))) == [("f", 1, 3)]


@pytest.mark.parametrize("text", ["/home/ann/data", "see /opt/x", str(PACKAGE.parent), f"'{PACKAGE.parent}/runs'"])
def test_a_machine_path_is_seen(text: str) -> None:
    assert MACHINE_PATH.search(text)


@pytest.mark.parametrize("text", ["~/home/x", "a/home/b", "https://x.y/opt/z", "runs/home/", "${HOME}/opt/x"])
def test_other_paths_are_let_through(text: str) -> None:
    assert not MACHINE_PATH.search(text)
