"""README, docs/ and configfiles/reference.yaml say what is true: commands run, messages come, links and captions fit.

How a page is read, block by block, in a folder of its own with a copy of configfiles/:

- a block that begins with `# file: NAME` is written to that file
- ```bash is run; a command with a comment of NOT_RUN is left out, and only its program is looked for
- ```console holds commands after `$ ` and what they print; `...` stands for anything
- ```python is run
- ```yaml is checked: as a whole config, or else laid over configfiles/digits.yaml
"""

from __future__ import annotations

import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import forks
import pytest
import yaml
from conftest import REPOSITORY, RunCli, Running, Tagged
from whole_runs import NO_MLFLOW, forked_from

from dtrain.config.check import check
from dtrain.config.errors import ConfigError, to_plain
from dtrain.config.load import load_config, place_of, to_yaml
from dtrain.config.rules import TOP_LEVEL
from dtrain.config.schema import PHASES
from dtrain.config.signatures import SOURCE
from dtrain.config.yaml12 import scalar
from dtrain.dataloader import loader_settings
from dtrain.distributed.ddp import ddp_options
from dtrain.distributed.fsdp import fsdp_options
from dtrain.launch.batch_script import cluster_settings
from dtrain.metrics import metric_settings
from dtrain.predict.predictor import Predictor
from dtrain.reporting.validation_pictures import picture_settings
from dtrain.tracking.journal import Journal
from dtrain.trainer import Trainer
from dtrain.training.parameter_groups import group_settings
from dtrain.training.schedule import schedule_settings

README = REPOSITORY / "README.md"
INDEX = REPOSITORY / "docs" / "index.md"
SITE = REPOSITORY / "scripts" / "site" / "mkdocs.yml"
PAGES = [README, *sorted((REPOSITORY / "docs").glob("*.md"))]
REFERENCE = REPOSITORY / "configfiles" / "reference.yaml"
# Comments that excuse a command from being run. Whoever adds one must find it true.
NOT_RUN = (
    *("needs the network once", "needs the quickstart's .venv", "needs a GPU", "needs 4 GPUs", "needs two machines"),
    "needs the repository's folder",
    *("needs SLURM", "needs an MPI", "needs MPICH", "needs Open MPI"),
    *("stays until Ctrl-C", "takes 10 minutes", "takes some minutes"),
)
TIMEOUT_SECONDS = 240
# Pages that take minutes. Other tests do the same in every run, from Python or with words of their own
# (test_configfiles.py, test_members.py, tests/predict/, tests/training/; test_own_loop.py and test_mixins.py take their
# code from own-loop); that the commands work, only --soak shows. Their configs are checked always.
SLOW = ("systems", "predict", "folds", "from-lightning", "training", "own-loop")
# Commands are forked from a process that has imported torch: most of a short command's time is that import. Only
# those of the first page a user works through are processes of their own.
COLD = "getting-started"
# The pages whose trainings are told to MLflow: its import takes as long as all else of a short training.
WITH_MLFLOW = ("README", "getting-started", "mlflow", "pictures")


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str
    line: int

    @property
    def file(self) -> str | None:
        match = re.match(r"# file: (\S+)\n", self.text)
        return match[1] if match else None


def name_of(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    return [Block(match[1], match[2], text.count("\n", 0, match.start()) + 1) for match in found]


def commands(block: Block) -> Iterator[tuple[str, str]]:
    """(command, why it is not run) of a bash block; lines that end in a backslash are joined."""
    for line in block.text.replace("\\\n", " ").splitlines():
        command, _, comment = line.partition(" # ")
        if command.strip():
            yield command.strip(), next((reason for reason in NOT_RUN if reason in comment), "")


class PageFolder:
    """A folder in which one page is worked through, with commands as a user has them."""

    def __init__(self, folder: Path, files: Path, store: Path, env: dict[str, str], tagged: Tagged, page: str) -> None:
        self.path, self.files, self.tagged = folder, files, tagged
        shutil.copytree(REPOSITORY / "configfiles", folder / "configfiles")
        self._shorten(folder / "configfiles" / "digits.yaml")
        programs = files / "bin"
        programs.mkdir()
        self.python = (
            [sys.executable] if page == COLD else [sys.executable, "-IS", forks.__file__, forked_from().address]
        )
        (programs / "dtrain").write_text(f'#!/bin/sh\nexec {shlex.join(self.python)} -m dtrain "$@"\n')
        (programs / "dtrain").chmod(0o755)
        self.forked = files / "forked"
        self.forked.touch()
        # One store for all: making it takes seconds.
        env = env | {"MLFLOW_TRACKING_URI": f"sqlite:///{store}", "FORKED_PIDS": str(self.forked)}
        if page not in WITH_MLFLOW:
            (files / "mlflow").mkdir()
            (files / "mlflow" / "__init__.py").write_text(NO_MLFLOW)
            env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(files), env.get("PYTHONPATH")]))
        self.env = env | {"PATH": os.pathsep.join([str(programs), str(Path(sys.executable).parent), env["PATH"]])}

    @staticmethod
    def _shorten(config: Path) -> None:
        text, times = re.subn(r"max_epochs: \d+", "max_epochs: 1", config.read_text())
        assert times == 1
        config.write_text(text)

    def run(self, *command: str) -> tuple[int, str]:
        files = self.files / str(len(self.tagged.started))
        files.mkdir()
        done = Running(command, self.path, self.env, files, self.tagged).result(TIMEOUT_SECONDS)
        self.tagged.sessions |= {int(pid) for pid in self.forked.read_text().split()}
        return done.rc, done.stderr + done.stdout


@pytest.fixture
def page_folder(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    clean_env: dict[str, str],
    tagged: Tagged,
    request: pytest.FixtureRequest,
) -> PageFolder:
    store = tmp_path_factory.getbasetemp() / "mlflow.db"
    page = request.node.callspec.params["page"].stem
    return PageFolder(tmp_path, tmp_path_factory.mktemp("files"), store, clean_env, tagged, page)


@pytest.mark.slow
@pytest.mark.timeout(900)  # a page is up to six trainings, one after another
@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.soak if page.stem in SLOW else ()) for page in PAGES], ids=name_of
)
def test_what_a_page_says_works(page: Path, page_folder: PageFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(page_folder.path)
    for block in blocks(page):
        if block.file:
            (page_folder.path / block.file).write_text(block.text)
        if block.language in READERS:
            try:
                READERS[block.language](block, page_folder)
            except Exception as error:
                error.add_note(f"in {name_of(page)}:{block.line}")
                raise


def run_bash(block: Block, folder: PageFolder) -> None:
    for command, excuse in commands(block):
        if excuse:
            assert_program_is_there(command, excuse, folder)
            continue
        rc, output = folder.run("bash", "-o", "pipefail", "-c", command)
        assert rc == 0, f"{command}\n{output}"


def assert_program_is_there(command: str, excuse: str, folder: PageFolder) -> None:
    program, *arguments = shlex.split(command)
    assert program in ("srun", "mpirun", "mpiexec", "source") or shutil.which(program, path=folder.env["PATH"]), (
        f"{command} ({excuse})"
    )
    scripts = [word for word in arguments if word.endswith((".sh", ".yaml"))]
    assert all((REPOSITORY / script).is_file() for script in scripts), command


def run_console(block: Block, folder: PageFolder) -> None:
    parts = re.split(r"^\$ (.*)\n", block.text, flags=re.M)
    assert not parts[0] and len(parts) > 2, "a console block begins with '$ COMMAND'"
    for command, expected in zip(parts[1::2], parts[2::2], strict=True):
        _, output = folder.run("bash", "-c", command)
        assert fits(output, expected), f"$ {command}\n{output}"


def fits(text: str, expected: str) -> bool:
    """Whether a text is the expected one, in which `...` stands for anything."""
    return bool(re.fullmatch(".*".join(map(re.escape, expected.strip().split("..."))), text.strip(), re.S))


def run_python(block: Block, folder: PageFolder) -> None:
    if not block.file:
        rc, output = folder.run(*folder.python, "-c", block.text)
        assert rc == 0, f"{block.text}\n{output}"


def config_of(block: Block, folder: Path) -> Path:
    """The file of a config: the block, or what it becomes laid over configfiles/digits.yaml."""
    file = folder / (block.file or "fragment.yaml")
    if not block.file:
        file.write_text(block.text)
        config = to_plain(load_config(file))
        if "model" not in config:
            base = to_plain(load_config(folder / "configfiles" / "digits.yaml"))
            if "metrics" in config:
                del base["trainer"]["monitor"], base["trainer"]["mode"]
            trainer = base["trainer"] | config.get("trainer", {})
            file.write_text(to_yaml(base | config | {"trainer": trainer}))
    return file


def check_yaml(block: Block, folder: PageFolder) -> None:
    file = config_of(block, folder.path)
    rc, output = folder.run("dtrain", "config", str(file))  # it checks everything that needs no import
    assert rc == 0, f"{block.text}\n{output}"


READERS: dict[str, Callable[[Block, PageFolder], None]] = {
    "bash": run_bash,
    "console": run_console,
    "mermaid": lambda block, folder: None,  # test_layers.py compares it
    "python": run_python,
    "yaml": check_yaml,
}


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem in SLOW], ids=name_of)
def test_the_configs_of_a_page_that_takes_minutes_have_no_mistake(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    shutil.copytree(REPOSITORY / "configfiles", tmp_path / "configfiles")
    SOURCE.forget()  # a page of before may have had modules of these names
    for block in blocks(page):
        if block.file:
            (tmp_path / block.file).write_text(block.text)
        if block.language == "yaml":
            check(load_config(config_of(block, tmp_path)))
    SOURCE.forget()


def test_every_block_has_a_language_that_is_checked() -> None:
    unknown = [
        f"{name_of(page)}:{block.line}" for page in PAGES for block in blocks(page) if block.language not in READERS
    ]
    assert unknown == []


def test_every_excuse_is_used() -> None:
    used = {
        excuse for page in PAGES for block in blocks(page) if block.language == "bash" for _, excuse in commands(block)
    }
    assert used - {""} == set(NOT_RUN)


@pytest.mark.parametrize(
    ("text", "expected", "fit"),
    [
        ("a: b\n", "a: b", True),
        ("a: b, c", "a: b...", True),
        ("x a: b, c", "...a: ..., c", True),
        ("a: b\nmore", "a: b", False),
        ("a: b", "a: c...", False),
        ("a+ b", "aa b", False),
    ],
)
def test_an_expected_output_is_compared(text: str, expected: str, fit: bool) -> None:
    assert fits(text, expected) is fit


def refused_rows() -> list[tuple[str, str]]:
    table = (REPOSITORY / "docs" / "config.md").read_text().partition("## What is refused")[2]
    return re.findall(r"^\| `(.+?)` \| (.+) \|$", table, re.M)


@pytest.mark.parametrize(("written", "message"), refused_rows())
def test_what_the_config_page_calls_refused_is_refused(
    written: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file, overrides = REPOSITORY / "configfiles" / "digits.yaml", [written]
    if written.startswith("{"):
        file, overrides = tmp_path / "file.yaml", []
        file.write_text(written)
    with pytest.raises(ConfigError) as caught:
        check(load_config(file, overrides))
    texts = [mistake.text for mistake in caught.value.mistakes]
    assert any(fits(text, message) for text in texts), texts


def test_the_config_page_shows_what_is_refused() -> None:
    assert len(refused_rows()) > 20


# ------------------------------------------------------------------------------------------------- links and captions


def headings(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, REPOSITORY / "CHANGELOG.md"], ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    for target, _, anchor in (link.partition("#") for link in re.findall(r"\]\(([^)\s]+)\)", text)):
        if re.match(r"https?:", target):
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{name_of(page)}: {target}"
        assert not anchor or anchor in headings(file), f"{name_of(page)}: {target}#{anchor}"


def test_the_first_page_names_every_other() -> None:
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", INDEX.read_text()))
    assert linked == {page.name for page in PAGES if page not in (README, INDEX)}


def test_the_readme_is_a_screen_and_a_half() -> None:
    assert len(README.read_text().splitlines()) <= 90


@pytest.mark.slow
def test_the_site_is_built_strictly_and_has_every_page(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="pip install -e '.[site]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", SITE, "--site-dir", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    made = {path.parent.name for path in tmp_path.glob("*/index.html")} - {"assets"}
    assert made == {page.stem for page in PAGES if page not in (README, INDEX)}
    assert 'href="../dtrain' not in (tmp_path / "training" / "index.html").read_text(), "a file the site has not"


def test_all_that_one_sees_on_opening_the_package_has_one_caption() -> None:
    page = (REPOSITORY / "docs" / "design.md").read_text()
    section = page.partition("## On opening `dtrain/`")[2].partition("\n## ")[0]
    found = re.findall(r"^\| `(\w+(?:/|\.py))` \| (\S.*\S) \|$", section, re.M)
    entries = [path for path in (REPOSITORY / "dtrain").iterdir() if not path.name.startswith("__")]
    wanted = [f"{path.name}/" if path.is_dir() else path.name for path in entries if path.name != "py.typed"]
    assert sorted(name for name, _ in found) == sorted(wanted)


@pytest.mark.parametrize("page", ["design", "contributing"])
def test_modules_that_a_page_names_are_there(page: str) -> None:
    """`config.load`, `distributed/stop_request.py`, and what is in a module: `training.optimizer.get_optimizer`."""
    package = REPOSITORY / "dtrain"
    packages = "|".join(path.name for path in package.iterdir() if path.is_dir())
    text = (REPOSITORY / "docs" / f"{page}.md").read_text()
    named = re.findall(rf"`(?:dtrain[./])?({packages})[./](\w+)(?:\.\w+)*`", text)
    assert len(named) > 5
    assert [f"{folder}/{name}" for folder, name in named if not list((package / folder).glob(f"{name}*"))] == []


def test_the_components_page_lists_every_method_to_override() -> None:
    table = (REPOSITORY / "docs" / "components.md").read_text().partition("### Methods to override")[2]
    listed = re.findall(r"^\| `(\w+)\((.*?)\)` \| .+ \| .+ \|$", table, re.M)
    public = {name: value for name, value in vars(Trainer).items() if inspect.isfunction(value) and name[0] != "_"}
    assert sorted(name for name, _ in listed) == sorted(public.keys() - {"fit"})
    for name, parameters in listed:
        names = [parameter.partition("=")[0] for parameter in parameters.split(", ") if parameter]
        assert names == list(inspect.signature(public[name]).parameters)[1:], name


# ------------------------------------------------------------------------------------------------------- the glossary

# Where a word that is not used means something else.
OTHER_MEANINGS = {
    "is no": r"there\s+is\s+no\b|is\s+no\s+(longer|more|less)\b",
    "are no": r"there\s+are\s+no\b|are\s+no\s+(longer|more|less)\b",
    "was no": r"there\s+was\s+no\b",
}


def words_not_used() -> list[str]:
    table = (REPOSITORY / "docs" / "contributing.md").read_text().partition("## Glossary")[2]
    cells = re.findall(r"^\| .+ \| .+ \| (.+) \|$", table, re.M)
    return [word for cell in cells for word in re.findall(r"`(.+?)`", cell)]


def places_of_words(words: list[str], text: str) -> list[tuple[int, str]]:
    """(line, word) of each word in a text that is not used in any other meaning there."""
    found = []
    for word in words:
        start, end = (r"\b" if one.isalnum() else "" for one in (word[0], word[-1]))
        other = OTHER_MEANINGS.get(word, r"(?!)")
        meant = re.sub(other, lambda match: "\n" * match[0].count("\n"), text, flags=re.I)
        matches = re.finditer(start + re.escape(word).replace(r"\ ", r"\s+(?:#\s+)?") + end, meant, re.I)
        found += [(meant.count("\n", 0, match.start()) + 1, word) for match in matches]
    return found


def test_the_words_that_the_glossary_replaces_are_not_used() -> None:
    words = words_not_used()
    assert len(words) > 20
    sources = [*(REPOSITORY / "dtrain").rglob("*.py"), *(REPOSITORY / "configfiles").iterdir()]
    files = {*PAGES, REPOSITORY / "CHANGELOG.md", *sources} - {REPOSITORY / "docs" / "contributing.md"}
    used = [
        f"{name_of(file)}:{line} {word}"
        for file in sorted(files)
        for line, word in places_of_words(words, file.read_text())
    ]
    assert used == [], "see the glossary in docs/contributing.md"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("the training goes on", [(1, "goes on")]),
        ("it goes\n    # on", [(1, "goes on")]),
        ("There is no file; it is no\nlonger there.", []),
        ("a\nthis is no number", [(2, "is no")]),
        ("tensorboard", []),
    ],
)
def test_words_are_found_where_they_are_meant(text: str, found: list[tuple[int, str]]) -> None:
    assert places_of_words(["goes on", "is no", "board"], text) == found


def test_nothing_names_a_path_of_one_machine() -> None:
    files = [
        *PAGES,
        REPOSITORY / "CHANGELOG.md",
        *(REPOSITORY / "configfiles").iterdir(),
        REPOSITORY / "docs" / "run.svg",
    ]
    machine = re.compile(rf"(?<![\w.])/(root|home|Users)/\w|{re.escape(str(REPOSITORY))}\b")
    assert {name_of(file) for file in files if machine.search(file.read_text())} == set()


# ------------------------------------------------------------------------------------------------------ reference.yaml

OWN_SETTINGS: dict[tuple[str, ...], tuple[Callable, set[str]]] = {
    ("trainer",): (Trainer.__init__, {"self", "parts"}),
    ("trainer", "ddp"): (ddp_options, set()),
    ("trainer", "fsdp"): (fsdp_options, set()),
    ("trainer", "pictures"): (picture_settings, set()),
    ("mlflow",): (Journal.__init__, {"self", "folder", "experiment", "run_name", "sender", "say"}),
    ("predictor",): (Predictor, set()),
    ("cluster",): (cluster_settings, set()),
    ("loaders",): (loader_settings, set()),
    ("optimizer",): (group_settings, set()),
    ("lr_scheduler",): (schedule_settings, set()),
    ("metrics",): (metric_settings, {"activation"}),  # of monai.metrics alone
}


def settings(path: tuple[str, ...]) -> dict[str, object]:
    """The keys that one of dtrain's own functions takes, with their defaults."""
    function, given = OWN_SETTINGS[path]
    return {key: item.default for key, item in inspect.signature(function).parameters.items() if key not in given}


def test_the_reference_has_every_section() -> None:
    assert set(yaml.safe_load(REFERENCE.read_text())) == set(TOP_LEVEL)


@pytest.mark.parametrize("path", OWN_SETTINGS, ids=".".join)
def test_the_reference_has_every_key_and_no_other(path: tuple[str, ...]) -> None:
    section = yaml.safe_load(REFERENCE.read_text())
    for key in path:
        section = section[key]
    components_own = {"name", *PHASES} if path in (("loaders",), ("lr_scheduler",)) else set()
    components_own |= {"folds"} if path == ("loaders",) else set()
    components_own |= {"name", "lr"} if path == ("optimizer",) else set()
    components_own |= {"name", "task", "num_classes", "Precision"} if path == ("metrics",) else set()
    assert set(section) - components_own == set(settings(path))


@pytest.mark.parametrize("path", OWN_SETTINGS, ids=".".join)
def test_the_reference_states_every_default(path: tuple[str, ...]) -> None:
    config, lines = load_config(REFERENCE), REFERENCE.read_text().splitlines()
    for key, default in settings(path).items():
        place = place_of(config, (*path, key))
        assert place is not None
        if key in ("ddp", "fsdp"):
            continue
        stated = re.search(r"Default: (\S+?)[,.]?(?:\s|$)", lines[place.line - 1])
        assert stated, f"line {place.line} states no default"
        assert scalar(stated[1]) == default, f"line {place.line}: the default is {default!r}"


def test_the_reference_trains_as_it_is(run_cli: RunCli) -> None:
    check(load_config(REFERENCE))
    done = run_cli([REFERENCE, "trainer.max_epochs=1"])
    assert done.rc == 0, done.text
