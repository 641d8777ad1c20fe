"""The rules of the code, read off the source: who may import whom and what, and how long functions are.

Complexity and numbers of parameters are ruff's to judge (C901 and PLR0913 in pyproject.toml). docs/contributing.md says
what to do when one of these tests fails.
"""

import ast
import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "dtrain"

# All that one sees on opening dtrain/. Each imports only what stands below it, imports for types included; those of one
# line never import one another. A new package takes its place here.
LAYERS = """
    cli
    launch
    trainer
    training
    predict
    dataloader  modelloader  loss  metrics  reporting  checkpoint
    data
    distributed
    config  tracking  components
"""
LINES = [line.split() for line in LAYERS.strip().splitlines()]
DEPTH = {name: depth for depth, names in enumerate(LINES) for name in names}

# One module alone imports these; MLflow's import takes seconds and may fail.
SOLE_IMPORTERS = {"importlib": "dtrain.config.build", "mlflow": "dtrain.tracking.mlflow_store"}
# Who may see a config: all others take plain values.
READS_CONFIG = {
    *("config", "cli", "launch", "trainer", "dataloader", "modelloader", "loss", "metrics"),
    *("training.setup", "training.optimizer", "training.same_training", "training.schedule"),
    *("training.origins", "training.saved_model"),  # the second makes the model of a run's own config
}
RANK_VARIABLES = {
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS", "SLURM_NPROCS"),
    *("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_RANK", "PMI_SIZE"),
}
HEAVY = {"torch", "accelerate", "torchmetrics", "mlflow", "sklearn", "rich"}
HEAVIER_THAN_HELP = {*HEAVY, "numpy", "ml_collections"}
MAX_FUNCTION_LINES = 60  # less the docstring, so that nobody saves on that
MACHINE_PATH = re.compile(rf"(?<![\w.~$}}-])/(?:root|home|Users|opt|mnt|media)/\w|{re.escape(str(PACKAGE.parent))}\b")


class Import(NamedTuple):
    """One imported name: `from a.b import c` in line 3 is ("a.b.c", 3, ...)."""

    name: str
    line: int
    at_start: bool  # executed when the module is imported

    def is_of(self, package: str) -> bool:
        return self.name == package or self.name.startswith(package + ".")


class Source(NamedTuple):
    """One file of the package."""

    path: Path
    text: str
    tree: ast.Module

    @property
    def module(self) -> str:
        parts = self.path.relative_to(PACKAGE.parent).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def top(self) -> str:
        """What one sees on opening dtrain/: a package, or a file without its ending."""
        return self.path.relative_to(PACKAGE).parts[0].removesuffix(".py")

    @property
    def is_dunder(self) -> bool:
        """dtrain's own `__init__` and `__main__`, which stand above all."""
        return self.top.startswith("__")

    def at(self, line: int) -> str:
        return f"{self.path.relative_to(PACKAGE.parent)}:{line}"


def source(path: Path, text: str) -> Source:
    return Source(path, text, ast.parse(text, path.name))


@functools.cache
def all_sources() -> list[Source]:
    return [source(path, path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))]


def engine() -> list[Source]:
    return [file for file in all_sources() if file.top != "components"]


@functools.cache
def imports(file: Source) -> list[Import]:
    """All imports of a file, those within functions and those for the type checker included."""
    return list(_imports(file.tree, file, at_start=True))


def _imports(node: ast.AST, file: Source, at_start: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, node.lineno, at_start) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = _absolute(node, file)
        yield from (Import(f"{base}.{alias.name}", node.lineno, at_start) for alias in node.names)
    elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "builtins.__import__"):
        yield Import("importlib", node.lineno, at_start)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        at_start = False
    for child in ast.iter_child_nodes(node):
        only_for_types = isinstance(node, ast.If) and child in node.body and "TYPE_CHECKING" in ast.unparse(node.test)
        yield from _imports(child, file, at_start and not only_for_types)


def _absolute(node: ast.ImportFrom, file: Source) -> str:
    if not node.level:
        return node.module or ""
    package_parts = file.module.split(".") if file.path.name == "__init__.py" else file.module.split(".")[:-1]
    base = package_parts[: len(package_parts) - node.level + 1]
    return ".".join([*base, node.module] if node.module else base)


def module_of(name: str) -> str:
    """The module that an imported name leads to: the longest beginning that is a file or a package of dtrain."""
    parts = name.split(".")
    while len(parts) > 1:
        path = PACKAGE.parent.joinpath(*parts)
        if path.is_dir() or path.with_suffix(".py").exists():
            break
        parts.pop()
    return ".".join(parts)


def own_imports(file: Source) -> list[tuple[str, Import]]:
    """(module, import) of all that a file imports of dtrain, without the package itself, which holds the version."""
    found = [(module_of(one.name), one) for one in imports(file) if one.is_of("dtrain")]
    return [(module, one) for module, one in found if module != "dtrain"]


def top_of(module: str) -> str:
    return module.split(".")[1]


def may_import(importer: str, imported: str) -> bool:
    """By what one sees on opening dtrain/; within a package all may, as long as no imports are circular."""
    return importer == imported or DEPTH[importer] < DEPTH[imported]


def circular(graph: dict[str, set[str]]) -> list[str]:
    """The members of all circular imports: who can be reached from itself."""

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        waiting = list(graph.get(start, ()))
        while waiting:
            if (name := waiting.pop()) not in found:
                found.add(name)
                waiting.extend(graph.get(name, ()))
        return found

    return sorted(name for name in graph if name in reached(name))


def names_of(file: Source) -> Iterator[tuple[str, int]]:
    """(name, line) of every name that a file uses, imports or writes in an annotation, quoted ones included."""
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Name):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute):
            yield node.attr, node.lineno
        elif isinstance(node, ast.alias):
            yield from ((part, node.lineno) for part in node.name.split("."))
        annotations = [getattr(node, name, None) for name in ("annotation", "returns")]
        for annotation in filter(None, annotations):
            quoted = (each for each in ast.walk(annotation) if isinstance(each, ast.Constant))
            yield from ((word, annotation.lineno) for each in quoted for word in re.findall(r"\w+", str(each.value)))


def parameters_of(file: Source) -> Iterator[tuple[str, int]]:
    return ((node.arg, node.lineno) for node in ast.walk(file.tree) if isinstance(node, ast.arg))


def rank_variables(file: Source) -> list[tuple[str, int]]:
    """Where a rank variable's name stands as a text of its own (in a docstring's sentence it does not)."""
    constants = (node for node in ast.walk(file.tree) if isinstance(node, ast.Constant))
    return [(node.value, node.lineno) for node in constants if node.value in RANK_VARIABLES]


def function_lengths(file: Source) -> Iterator[tuple[str, int, int]]:
    """(name, line, lines without the docstring) of each function; of a config's section without its keys."""
    for node in ast.walk(file.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            is_section = len(node.args.kwonlyargs) > 7
            begin = node.body[0].lineno if is_section else node.lineno
            length = (node.end_lineno or begin) - begin + 1
            if ast.get_docstring(node, clean=False) is not None:
                first = node.body[0]
                length -= (first.end_lineno or first.lineno) - first.lineno + 1
            yield node.name, node.lineno, length


# Who may import whom


def test_one_sees_six_files_and_ten_folders() -> None:
    entries = [path for path in PACKAGE.iterdir() if not path.name.startswith("__") and path.name != "py.typed"]
    files = {path.stem for path in entries if path.suffix == ".py"}
    folders = {path.name for path in entries if path.is_dir()}
    assert len(entries) == len(files) + len(folders)
    assert files | folders == DEPTH.keys(), "a new package takes its place in LAYERS"
    assert (len(files), len(folders)) == (6, 10)


def test_the_design_page_draws_these_layers() -> None:
    picture = re.search(r"```mermaid\n(.*?)```", (PACKAGE.parent / "docs" / "design.md").read_text(), re.S)
    assert picture is not None
    boxes = dict(re.findall(r"subgraph (\w+) .*?\n\s+(.*?)\n\s+end", picture[1]))
    (chain,) = re.findall(r"^\s+(.* --> .*)$", picture[1], re.M)
    assert [boxes.get(name, name).split(" ~~~ ") for name in chain.split(" --> ")] == LINES


def test_imports_go_downwards_only() -> None:
    upwards = [
        f"{file.at(one.line)} {file.top} imports {module}"
        for file in engine()
        for module, one in own_imports(file)
        if not file.is_dunder and not may_import(file.top, top_of(module))
    ]
    assert upwards == [], "see 'What the layers test says' in docs/contributing.md"


def test_there_are_no_circular_imports() -> None:
    graph = {file.module: {module for module, _ in own_imports(file)} for file in all_sources()}
    assert circular(graph) == []


def test_components_import_no_engine() -> None:
    files = [file for file in all_sources() if file.top == "components"]
    assert files, "there are no components"
    foreign = [
        f"{file.at(one.line)} {one.name}"
        for file in files
        for one in imports(file)
        if one.is_of("dtrain") and not one.is_of("dtrain.components")
    ]
    assert foreign == []


def test_the_engine_knows_components_by_name_only() -> None:
    known = [file.at(one.line) for file in engine() for module, one in own_imports(file) if "components" in module]
    assert known == []


def test_nobody_below_launch_knows_the_trainer() -> None:
    """Helpers receive plain values and finished parts; the trainer itself is known to who starts it."""
    lower = [file for file in engine() if not file.is_dunder and file.top not in ("cli", "launch", "trainer")]
    imported = [file.at(one.line) for file in lower for module, one in own_imports(file) if module == "dtrain.trainer"]
    named = [file.at(line) for file in lower for name, line in names_of(file) if name == "Trainer"]
    received = [file.at(line) for file in lower for name, line in parameters_of(file) if name == "trainer"]
    assert {"imported": imported, "named": named, "received": received} == {"imported": [], "named": [], "received": []}


def test_modules_take_nothing_but_the_version_from_dtrain_itself() -> None:
    taken = []
    for file in engine():
        if file.is_dunder:
            continue
        names = [one.name for one in imports(file) if one.is_of("dtrain") and module_of(one.name) == "dtrain"]
        taken += [(file.module, name.removeprefix("dtrain.")) for name in names if name != "dtrain"]
        values = (node for node in ast.walk(file.tree) if isinstance(node, ast.Attribute))
        taken += [(file.module, node.attr) for node in values if ast.unparse(node.value) == "dtrain"]
    allowed = {*DEPTH, "__version__"}
    assert [(module, name) for module, name in taken if name not in allowed] == []


# Who may import what


def importers(name: str) -> dict[str, list[str]]:
    """Module -> the places where it imports a package."""
    found: dict[str, list[str]] = {}
    for file in all_sources():
        for one in imports(file):
            if one.is_of(name):
                found.setdefault(file.module, []).append(file.at(one.line))
    return found


@pytest.mark.parametrize(("name", "owner"), SOLE_IMPORTERS.items())
def test_one_module_alone_imports(name: str, owner: str) -> None:
    found = importers(name)
    assert owner in found, f"{owner} no longer imports {name}: does this rule still hold?"
    assert {module: places for module, places in found.items() if module != owner} == {}


def test_only_the_environment_module_names_rank_variables() -> None:
    found = [(file.module, name, file.at(line)) for file in all_sources() for name, line in rank_variables(file)]
    owner = "dtrain.distributed.environment"
    assert owner in {module for module, _, _ in found}
    assert [(name, place) for module, name, place in found if module != owner] == []


def test_the_config_stops_at_the_border() -> None:
    """All but those who read it take plain values."""
    found = importers("ml_collections")
    allowed = {f"dtrain.{name}" for name in READS_CONFIG}
    inside = {module for module in found if module in allowed or module.rpartition(".")[0] in allowed}
    assert {module: places for module, places in found.items() if module not in inside} == {}


# How light they are


def loaded_by(code: str, *arguments: str) -> set[str]:
    """The top-level packages that a fresh interpreter has loaded after the code."""
    ending = "\nimport json, sys\nprint('LOADED', json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", code + ending, *arguments],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.rpartition("LOADED")[2]))


def test_importing_a_package_imports_nothing_heavy() -> None:
    packages = ["dtrain", *(f"dtrain.{name}" for name in DEPTH if (PACKAGE / name).is_dir())]
    code = "\n".join(
        f"import {name}; assert not (loaded := {HEAVIER_THAN_HELP} & {{*sys.modules}}), ('{name}', loaded)"
        for name in packages
    )
    assert "dtrain" in loaded_by(f"import sys\n{code}")


@pytest.mark.parametrize(
    ("start", "heavy"),
    [
        ("dtrain.cli", HEAVIER_THAN_HELP),
        ("dtrain.config", HEAVY),  # a mistake in a config is found before anything heavy is imported
        ("dtrain.tracking", HEAVIER_THAN_HELP),
        ("dtrain.reporting.progress", HEAVY),
        ("dtrain.reporting.terminal_progress", HEAVY),
    ],
)
def test_light_modules_import_nothing_heavy_at_their_start(start: str, heavy: set[str]) -> None:
    files = [file for file in all_sources() if file.module == start or file.module.startswith(start + ".")]
    written = [(file, one) for file in files for one in imports(file) if one.at_start]
    assert [f"{file.at(one.line)} {one.name}" for file, one in written if one.name.split(".")[0] in heavy] == []
    assert loaded_by("\n".join(f"import {file.module}" for file in files)) & heavy == set()


def test_help_imports_neither_torch_nor_rich_nor_mlflow() -> None:
    code = """
import runpy, sys
sys.argv = ["dtrain", "--help"]
try:
    runpy.run_module("dtrain", run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code, end.code
"""
    assert loaded_by(code) & HEAVIER_THAN_HELP == set()


# How things read


def test_every_module_says_what_it_is() -> None:
    assert [file.at(1) for file in all_sources() if not ast.get_docstring(file.tree)] == []


def test_functions_fit_on_a_screen() -> None:
    long = [
        f"{file.at(line)} {name}: {length} lines"
        for file in all_sources()
        for name, line, length in function_lengths(file)
        if length > MAX_FUNCTION_LINES
    ]
    assert long == []


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
        ("from .config import load_config", "dtrain.config.load_config", True),
    ],
)
def test_every_way_to_import_is_seen(text: str, name: str, at_start: bool) -> None:
    assert [(one.name, one.at_start) for one in imports(sample(text)) if one.name != "os"] == [(name, at_start)]


def test_relative_imports_of_packages_are_resolved() -> None:
    inside = sample("from .vit import ViT\nfrom ... import trainer", "components/models/__init__.py")
    assert [one.name for one in imports(inside)] == ["dtrain.components.models.vit.ViT", "dtrain.trainer"]
    assert (inside.top, inside.module) == ("components", "dtrain.components.models")


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("dtrain.config.load.load_config", "dtrain.config.load"),
        ("dtrain.config.load", "dtrain.config.load"),
        ("dtrain.config.load_config", "dtrain.config"),
        ("dtrain.trainer.Trainer", "dtrain.trainer"),
        ("dtrain.__version__", "dtrain"),
    ],
)
def test_an_import_leads_to_a_module(name: str, module: str) -> None:
    assert module_of(name) == module


@pytest.mark.parametrize(
    "text",
    ["os.environ['RANK']", "os.environ.get('RANK', 0)", "os.getenv('RANK')", "'RANK' in os.environ", "NAME = 'RANK'"],
)
def test_every_way_to_name_a_rank_variable_is_seen(text: str) -> None:
    assert rank_variables(sample(f'"""Knows no RANK."""\n{text}')) == [("RANK", 2)]


@pytest.mark.parametrize(
    "text",
    [
        "from dtrain.trainer import Trainer",
        "import dtrain.trainer\nmake(dtrain.trainer.Trainer)",
        "def f(it: Trainer): ...",
        "def f(it: 'Trainer | None'): ...",
        "def f() -> 'list[Trainer]': ...",
        "it: 'Trainer'",
    ],
)
def test_every_way_to_name_the_trainer_is_seen(text: str) -> None:
    assert "Trainer" in {name for name, _ in names_of(sample(text))}
    assert "Trainer" not in {name for name, _ in names_of(sample('"""Of a Trainer."""\nx = {"Trainer": 1}'))}


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("cli", "config", True),
        ("trainer", "loss", True),
        ("launch", "trainer", True),
        ("tracking", "tracking", True),
        ("training", "trainer", False),
        ("loss", "metrics", False),
        ("checkpoint", "reporting", False),
        ("config", "tracking", False),
        ("distributed", "data", False),
    ],
)
def test_the_order_allows_and_forbids(importer: str, imported: str, allowed: bool) -> None:
    assert may_import(importer, imported) is allowed


def test_circular_imports_are_seen() -> None:
    assert circular({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c"]
    assert circular({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_a_function_is_measured_without_its_docstring() -> None:
    text = 'def f():\n    """One.\n\n    Two.\n    """\n    x = 1\n    return x\n'
    assert list(function_lengths(sample(text))) == [("f", 1, 3)]


@pytest.mark.parametrize("text", ["/home/ann/data", "see /opt/x", str(PACKAGE.parent), f"'{PACKAGE.parent}/runs'"])
def test_a_machine_path_is_seen(text: str) -> None:
    assert MACHINE_PATH.search(text)


@pytest.mark.parametrize("text", ["~/home/x", "a/home/b", "https://x.y/opt/z", "runs/home/", "${HOME}/opt/x"])
def test_other_paths_are_let_through(text: str) -> None:
    assert not MACHINE_PATH.search(text)
