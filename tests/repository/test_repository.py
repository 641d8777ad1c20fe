"""What surrounds the package: metadata, pinned versions, scripts and their environment."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from conftest import REPOSITORY
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

SCRIPTS = [*sorted((REPOSITORY / "scripts").rglob("*.sh")), REPOSITORY / ".ci" / "run"]


def project() -> dict:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def pins() -> dict[str, str]:
    lines = (REPOSITORY / "requirements.lock").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


@pytest.mark.parametrize("extra", ["", "examples", "gpu", "test"])
def test_what_the_package_asks_for_is_pinned_within_its_range(extra: str) -> None:
    metadata = project()
    wanted = metadata["optional-dependencies"][extra] if extra else metadata["dependencies"]
    for requirement in map(Requirement, wanted):
        assert pins()[canonicalize_name(requirement.name)] in requirement.specifier


def test_the_pins_bring_no_cuda_packages_and_no_torchvision() -> None:
    cuda = [name for name in pins() if re.match(r"nvidia-.*cu\d+$|nvidia-c|cuda-|triton|torchvision|torchaudio", name)]
    assert cuda == []
    assert re.fullmatch(r"\d+\.\d+\.\d+", pins()["torch"]), "a local version (+cpu) would refuse every other build"


def test_the_installed_version_is_the_one_in_the_source() -> None:
    import importlib.metadata

    import dtrain

    assert importlib.metadata.version("dtrain") == dtrain.__version__


def test_scripts_are_clean() -> None:
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", "-x", *SCRIPTS], cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert done.stdout == ""


def test_ci_runs_the_test_script_and_nothing_else() -> None:
    lines = (REPOSITORY / ".ci" / "run").read_text().splitlines()
    commands = [line for line in lines if line and not line.startswith("#")]
    assert commands == ['exec bash "$(dirname -- "$0")/../scripts/test.sh"']


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    # A copy: building leaves folders behind.
    copy = tmp_path / "copy"
    for name in ("dtrain", "tests", "scripts"):
        shutil.copytree(REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, copy)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*pip, "-w", tmp_path, copy], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "dtrain",
        wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info",
    }
    sources = {str(path.relative_to(copy)) for path in (copy / "dtrain").rglob("*.py")}
    assert sources | {"dtrain/py.typed"} <= set(names)


# venv.sh, on a small repository of its own whose torch is a stand-in: no GPU and no network are needed

CALL = """
set -euo pipefail
source "$0/scripts/venv.sh"
make_venv
"$python" -c "import dtrain, torch; print(torch.__version__)"
"""
# Builds nothing: hands pip the wheel that the test has written.
BUILD_BACKEND = """
import pathlib, shutil

def build_editable(folder, config_settings=None, metadata_directory=None):
    (wheel,) = pathlib.Path("editable").glob("*.whl")
    return pathlib.Path(shutil.copy(wheel, folder)).name
"""


def write_wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> str:
    """Writes a wheel of a few files and returns its name."""
    dist = f"{name}-{version}.dist-info"
    metadata = {
        f"{dist}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{dist}/WHEEL": "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in (*files, *metadata, f"{dist}/RECORD"))
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in {**files, **metadata, f"{dist}/RECORD": record}.items():
            archive.writestr(path, text)
    return wheel.name


def stand_in_torch(folder: Path, version: str, sees_gpu: bool) -> None:
    code = f"__version__ = {version!r}\n\nclass cuda:\n    is_available = staticmethod(lambda: {sees_gpu})\n"
    write_wheel(folder, "torch", version, {"torch/__init__.py": code})


class SmallRepository:
    """scripts/venv.sh beside a package of one file; packages come from a folder of wheels alone."""

    def __init__(self, root: Path, clean_env: dict[str, str]) -> None:
        self.root, self.wheels = root / "a repository", root / "wheels"
        for folder in (self.wheels, *(self.root / name for name in ("scripts", "dtrain", "editable"))):
            folder.mkdir(parents=True)
        shutil.copy(REPOSITORY / "scripts" / "venv.sh", self.root / "scripts")
        (self.root / "dtrain" / "__init__.py").touch()
        (self.root / "pyproject.toml").write_text(
            '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        )
        (self.root / "backend.py").write_text(BUILD_BACKEND)
        write_wheel(self.root / "editable", "dtrain", "1", {"dtrain.pth": f"{self.root}\n"})
        self.env = {key: value for key, value in clean_env.items() if not key.startswith(("PIP_", "PYTHON"))}
        self.env |= {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": self.wheels.as_uri()}

    def lock(self, *lines: str) -> None:
        (self.root / "requirements.lock").write_text("# made by a test\n" + "".join(f"{line}\n" for line in lines))

    def make(self, python: str | None = sys.executable) -> subprocess.CompletedProcess[str]:
        env = self.env | ({"PYTHON": python} if python else {})
        command = ["bash", "-c", CALL, self.root]
        return subprocess.run(command, cwd="/", env=env, capture_output=True, text=True, timeout=200)


@pytest.fixture
def small(tmp_path: Path, clean_env: dict[str, str]) -> SmallRepository:
    return SmallRepository(tmp_path, clean_env)


def test_the_environment_is_made_once_and_follows_the_lock(small: SmallRepository) -> None:
    stand_in_torch(small.wheels, "2.13.0+cpu", sees_gpu=False)
    small.lock("torch==2.13.0")
    first = small.make()
    assert (first.returncode, first.stdout) == (0, "2.13.0+cpu\n"), first.stderr
    assert "installing requirements.lock" in first.stderr

    again = small.make(python=None)
    assert (again.stdout, again.stderr) == ("2.13.0+cpu\n", "")

    stand_in_torch(small.wheels, "2.14.0+cpu", sees_gpu=False)
    small.lock("torch==2.14.0")
    changed = small.make()
    assert changed.stdout == "2.14.0+cpu\n", changed.stderr
    assert "is used; delete it to have it made with PYTHON=" in changed.stderr

    small.lock("torch==2.14.0", "no-such-package==1")
    for _ in range(2):  # a failed installation is no finished one
        failed = small.make(python=None)
        assert failed.returncode != 0
        assert "no-such-package" in failed.stderr


@pytest.mark.soak
def test_a_torch_that_sees_a_gpu_is_kept(small: SmallRepository) -> None:
    stand_in_torch(small.wheels, "2.12.1+cu130", sees_gpu=True)
    small.lock("torch==2.12.1")
    assert small.make().returncode == 0
    stand_in_torch(small.wheels, "2.13.0+cpu", sees_gpu=False)
    small.lock("torch==2.13.0")
    kept = small.make(python=None)
    assert kept.stdout == "2.12.1+cu130\n", kept.stderr
    assert "torch==2.12.1+cu130 sees a GPU and is kept" in kept.stderr


def test_a_python_that_is_too_old_or_missing_is_named(small: SmallRepository) -> None:
    small.lock("torch==2.13.0")
    refused = small.make(python="no-such-python")
    assert refused.returncode == 1
    assert "dtrain needs Python 3.11 or newer; tried: no-such-python" in refused.stderr
    assert not (small.root / ".venv").exists()
