"""What a name stands for and what it takes, read from source text without an import; compared with what Python says."""

# ruff: noqa: E501 - a case of a table is one line, so that message and cause stand together

import inspect
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dtrain.config.signatures import Callee, Dynamic, Source, module_file

LIBRARIES = (
    "torch.nn",
    "torch.optim",
    "torch.optim.lr_scheduler",
    "torchmetrics",
    "torchmetrics.classification",
    "torchmetrics.segmentation",
    "torch.utils.data",
)
# Classes whose metaclass or compiled base may change their arguments: these are looked at when they are imported.
NOT_READ = {"Parameter", "Buffer", "Tensor", "IterDataPipe", "DFIterDataPipe", "MapDataPipe", "IterableDataset"}


def public_classes(library: str) -> dict[str, type]:
    module = sys.modules[library]
    found = {name: getattr(module, name) for name in dir(module) if not name.startswith("_")}
    own = ("torch", "torchmetrics")
    return {
        name: one
        for name, one in found.items()
        if inspect.isclass(one) and one.__module__.partition(".")[0] in own and name not in NOT_READ
    }


@pytest.fixture(scope="module")
def source() -> Source:
    """One reader for the tests about libraries: what it has parsed, it keeps."""
    return Source()


@pytest.mark.slow
def test_every_class_of_the_libraries_takes_what_inspect_says(source: Source) -> None:
    """Names, order and which are required, for some 290 classes; and no class is left to an import."""
    compared, differing = set(), []
    for library in LIBRARIES:
        __import__(library)
        for name, one in public_classes(library).items():
            callee = source.lookup(library, name)
            parameters = inspect.signature(one).parameters.values()
            plain = [item for item in parameters if item.kind not in (item.VAR_KEYWORD, item.VAR_POSITIONAL)]
            if not isinstance(callee, Callee):
                differing.append(f"{library}.{name}: {callee}")
                continue
            expected = [(item.name, item.default is item.empty) for item in plain]
            own = [(item.name, item.default is None) for item in callee.parameters if not item.through]
            takes_more = any(item.kind == item.VAR_KEYWORD for item in parameters)
            more_is_possible = takes_more or not (callee.open or any(item.through for item in callee.parameters))
            hidden = takes_more and not plain  # a decorator hides what is behind it; the source tells
            if (own != expected and not hidden) or not more_is_possible:
                differing.append(f"{library}.{name}: {own} instead of {expected}")
            compared.add(one)
    assert differing == []
    assert len(compared) > 280


def test_no_class_of_torch_or_torchmetrics_that_hides_behind_kwargs_is_open(source: Source) -> None:
    is_open = {
        name
        for library in LIBRARIES
        for name in source.names(library)
        if isinstance(callee := source.lookup(library, name), Callee) and callee.is_class and callee.open
    }
    assert is_open == {"Container", "StackDataset", "PermutationInvariantTraining"}


@pytest.mark.parametrize(
    ("library", "name", "through"),
    [
        ("torch.nn", "LSTM", {"input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size", "device", "dtype"}),
        ("torch.nn", "Sigmoid", set()),
        ("torchmetrics", "Accuracy", {"zero_division", "compute_on_cpu", "dist_sync_on_step", "process_group", "dist_sync_fn", "sync_on_compute", "compute_with_cache", "distributed_available_fn"}),
    ],
)  # fmt: skip
def test_what_goes_through_kwargs_is_followed(source: Source, library: str, name: str, through: set[str]) -> None:
    callee = source.lookup(library, name)
    assert isinstance(callee, Callee)
    assert {item.name for item in callee.parameters if item.through} == through


def test_a_signature_is_shown_in_full_but_for_a_long_tail(source: Source) -> None:
    accuracy, adamw = source.lookup("torchmetrics", "Accuracy"), source.lookup("torch.optim", "SGD")
    assert isinstance(accuracy, Callee)
    assert isinstance(adamw, Callee)
    assert accuracy.signature.endswith(
        "**kwargs: zero_division, compute_on_cpu, dist_sync_on_step, process_group and 4 more)"
    )
    assert adamw.signature.startswith("SGD(params: ParamsT, lr: float | Tensor = 0.001, momentum: float = 0, ")


# ------------------------------------------------------------------------------------------------- one's own classes

Read = Callable[..., Any]


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Read:
    """`read(text, name, more)`: what `name` is in a module of this text, beside the files of `more`."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def look(text: str, name: str = "C", more: dict[str, str] | None = None) -> Any:
        for file, content in {"mine.py": text, **(more or {})}.items():
            path = tmp_path / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(content), encoding="utf-8")
        return Source().lookup("mine", name)

    return look


def takes(callee: Any) -> str:
    """`a b=` and then `**` if it takes anything, `?` where nothing can be told."""
    if not isinstance(callee, Callee):
        return "?"
    names = [item.name + ("" if item.default is None else "=") for item in callee.parameters]
    return " ".join(names + ["*"] * callee.variadic + ["**"] * callee.open)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("class C:\n    def __init__(self, a, /, b, c=1, *, d, e=None): ...", "a b c= d e="),
        ("def C(a, b=1, *args, **kwargs): return kwargs", "a b= * **"),
        ("def C(a, b=1, **kwargs): pass", "a b="),
        ("class C: pass", ""),
        ("class C(object): x = 1", ""),
        ("class C(Base): pass\nclass Base:\n    def __init__(self, a): ...", "a"),
        ("class B:\n    def __init__(self, a): ...\nclass C(B): pass", "a"),
        # **kwargs
        ("class C:\n    def __init__(self, a, **kwargs): self.b = kwargs.pop('b', 1)", "a b="),
        ("class C:\n    def __init__(self, a, **kwargs): self.b = kwargs.get('b')", "a b="),
        ("class C:\n    def __init__(self, a, **kwargs): self.b = kwargs['b']", "a b="),
        ("class C:\n    def __init__(self, a, **kwargs):\n        if 'b' in kwargs: self.b = 1", "a b="),
        ("class C:\n    def __init__(self, a, **kwargs): self.b = kwargs.setdefault('b', 1)", "a b="),
        ("class C:\n    def __init__(self, a, **kwargs): self.kwargs = kwargs", "a **"),
        ("class C:\n    def __init__(self, a, **kwargs): self.__dict__.update(kwargs)", "a **"),
        ("class C:\n    def __init__(self, a, **kwargs):\n        for k, v in kwargs.items(): setattr(self, k, v)", "a **"),
        ("class C:\n    def __init__(self, a, **kwargs):\n        for k in list(kwargs): setattr(self, k, kwargs[k])", "a **"),
        ("class C:\n    def __init__(self, a, **kwargs): self.x = kwargs.pop(a)", "a **"),
        ("class C:\n    def __init__(self, a, **kwargs): self.x = {**kwargs}", "a **"),
        ("class C:\n    def __init__(self, a, **kwargs): self.x = dict(kwargs)", "a **"),
        ("class C:\n    def __init__(self, a, **kwargs): self.setup(**kwargs)", "a **"),
        ("class C:\n    def __init__(self, a, **kwargs): kwargs = other()", "a **"),
        ("class C:\n    def __init__(self, a, **kwargs): super().__init__()", "a"),
        ("class C:\n    def __init__(self, a, **kwargs): del kwargs", "a"),
        ("class C:\n    def __init__(self, a, **kwargs):\n        if kwargs: raise TypeError(f'{kwargs} {list(kwargs)}')", "a"),
        ("class C:\n    def __init__(self, a, **kwargs):\n        assert not kwargs, len(kwargs)", "a"),
        ("class B:\n    def __init__(self, b, c=1): ...\nclass C(B):\n    def __init__(self, a, **kwargs): super().__init__(**kwargs)", "a b c="),
        ("class B:\n    def __init__(self, b, c=1): ...\nclass C(B):\n    def __init__(self, a, **kwargs): super().__init__(a, **kwargs)", "a c="),
        ("class B:\n    def __init__(self, b, c=1): ...\nclass C(B):\n    def __init__(self, a, **kwargs): super().__init__(c=a, **kwargs)", "a b"),
        ("class B:\n    def __init__(self, b, c=1): ...\nclass C(B):\n    def __init__(self, a, **kwargs): super(C, self).__init__(1, **kwargs)", "a c="),
        ("class B:\n    def __init__(self, b, c=1): ...\nclass C(B):\n    def __init__(self, a, **kwargs): B.__init__(self, a, **kwargs)", "a c="),
        ("class B:\n    def __init__(self, b, c=1): ...\nclass C(B):\n    def __init__(self, *args, **kwargs): super().__init__(*args, **kwargs)", "b c= *"),
        ("class B:\n    def __init__(self, b, **kwargs): self.all = kwargs\nclass C(B):\n    def __init__(self, a, **kwargs): super().__init__(**kwargs)", "a **"),
        ("def inner(x, y=2): ...\nclass C:\n    def __init__(self, a, **kwargs): self.x = inner(a, **kwargs)", "a y="),
        ("def inner(x, y=2): ...\ndef C(a, **kwargs): return inner(x=a, **kwargs)", "a y="),
        ("import torch.nn as nn\nclass C:\n    def __init__(self, a, **kwargs): self.x = nn.Dropout(**kwargs)", "a p= inplace="),
        ("import functools\ndef C(a, **kwargs): return functools.partial(print, **kwargs)", "a **"),
        ("def C(a, **kwargs): return C(a, **kwargs) if kwargs.pop('more', 0) else a", "a more="),  # calls itself
        ("def f(x, **k): return C(x, **k)\ndef C(a, **kwargs): return f(a, **kwargs)", "a"),  # and one another
        # inheritance
        ("class A:\n    def __init__(self, a): ...\nclass B:\n    def __init__(self, b): ...\nclass C(A, B): pass", "a"),
        ("class R:\n    def __init__(self, r): ...\nclass A(R): pass\nclass B(R):\n    def __init__(self, b): ...\nclass C(A, B): pass", "b"),
        ("class A:\n    def __init__(self, a, **kwargs): super().__init__(**kwargs)\nclass B:\n    def __init__(self, b): ...\nclass C(A, B): pass", "a b"),
        ("from typing import Generic, TypeVar\nT = TypeVar('T')\nclass C(Generic[T]):\n    def __init__(self, a): ...", "a"),
        ("import abc\nclass C(abc.ABC):\n    def __init__(self, a): ...", "a"),
        ("class C(metaclass=abc.ABCMeta):\n    def __init__(self, a): ...", "a"),
        ("class M(type): ...\nclass C(metaclass=M):\n    def __init__(self, a): ...", "?"),
        ("import enum\nclass C(enum.Enum): x = 1", "?"),
        ("class C(make()): pass", "?"),
        ("class C(make()):\n    def __init__(self, a): ...", "a"),
        ("class C(unknown.Base): pass", "?"),
        ("class C(C): pass", "?"),
        ("class C:\n    def __new__(cls, a): ...", "a"),
        ("class C:\n    def __new__(cls, *args, **kwargs): ...\n    def __init__(self, a): ...", "a"),
        ("class C:\n    __init__ = other", "?"),
        ("class C:\n    if True:\n        def __init__(self, a): ...", "a"),
        # records
        ("from dataclasses import dataclass\n@dataclass\nclass C:\n    a: int\n    b: int = 1", "a b="),
        ("import dataclasses as d\n@d.dataclass(frozen=True)\nclass C:\n    a: int\n    b: list = d.field(default_factory=list)\n    c: int = d.field(init=False)\n    k: ClassVar[int] = 1\n    e: int = d.field(default=3)", "a b= e="),
        ("from dataclasses import dataclass\n@dataclass\nclass B:\n    a: int\n@dataclass\nclass C(B):\n    b: int = 1", "a b="),
        ("from dataclasses import dataclass\n@dataclass(init=False)\nclass C:\n    a: int", ""),
        ("from typing import NamedTuple\nclass C(NamedTuple):\n    a: int\n    b: int = 1", "a b="),
        # decorators
        ("@register('x')\nclass C:\n    def __init__(self, a): ...", "a"),
        ("@attrs.define\nclass C:\n    a: int", "?"),
        ("@wrap\ndef C(a): ...", "?"),
        ("class C:\n    @configurable\n    def __init__(self, a): ...", "?"),
        ("import torch\n@torch.no_grad()\ndef C(a): ...", "a"),
        ("import functools\n@functools.lru_cache(maxsize=None)\ndef C(a): ...", "a"),
        # other ways to bind a name
        ("class D:\n    def __init__(self, a): ...\nC = D", "a"),
        ("class D:\n    def __init__(self, a): ...\nC: type = D", "a"),
        ("import torch\nC = torch.nn.Dropout", "p= inplace="),
        ("import torch.nn as nn\nC = nn.Dropout", "p= inplace="),
        ("from torch import nn\nC = nn.Dropout", "p= inplace="),
        ("from torch.nn import Dropout as C", "p= inplace="),
        ("from torch.nn import *\nC = Dropout", "p= inplace="),
        ("def D(a): ...\nC = wrap(D)", "?"),
        ("def C(a): ...\nC = wrap(C)", "?"),
        ("def C(a): ...\nC.help = 'x'", "a"),
        ("C, D = make()", "?"),
        ("C = D\nD = C", "?"),
        ("if A:\n    def C(a): ...\nelse:\n    def C(b): ...", "?"),
        ("try:\n    from not_installed_here import C\nexcept ImportError:\n    def C(a): ...", "?"),
        ("try:\n    def C(a): ...\nexcept ImportError:\n    def C(b): ...", "a"),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    def C(a): ...\nelse:\n    def C(b): ...", "b"),
        ("with x:\n    def C(a): ...", "a"),
        ("from typing import overload\n@overload\ndef C(a): ...\n@overload\ndef C(b): ...\ndef C(a, b=1): ...", "a b="),
        ("async def C(a): ...", "a"),
        ("C = lambda a: a", "?"),
        ("def __getattr__(name): ...", "?"),
        ("globals()['C'] = 1", "?"),
    ],
)  # fmt: skip
def test_a_class_or_function_takes(read: Read, body: str, expected: str) -> None:
    assert takes(read(body)) == expected


def test_what_is_not_there_is_nothing(read: Read) -> None:
    assert read("class D: pass") is None
    assert read("") is None
    assert Source().lookup("no_such_module_at_all", "C") is None


def test_the_standard_library_is_named_but_not_followed(read: Read) -> None:
    assert read("import os", "os") == "os"
    assert read("import os.path as p", "p") == "os.path"
    assert read("from os import system as C") == "os.system"
    assert read("import os\nC = os.system") == "os.system"
    assert read("from os import *", "system") is None
    assert read("from other import C", more={"other.py": "from subprocess import run as C"}) == "subprocess.run"


def test_a_name_is_followed_through_packages_and_relative_imports(read: Read) -> None:
    files = {
        "pack/__init__.py": "from .inner import *\nfrom .inner.deep import D as E\nfrom . import single",
        "pack/inner/__init__.py": "from .deep import D\nfrom ..single import S",
        "pack/inner/deep.py": "class D:\n    def __init__(self, a): ...",
        "pack/single.py": "class S:\n    def __init__(self, s): ...",
        "spaces/of/names.py": "class N:\n    def __init__(self, n): ...",
    }
    assert read("from pack import D as C", more=files).module == "pack.inner.deep"
    assert takes(read("from pack import E as C")) == "a"
    assert takes(read("from pack import S as C")) == "s"
    assert read("from pack import single as C") == "pack.single"
    assert takes(read("import pack.single\nC = pack.single.S")) == "s"
    assert takes(read("from spaces.of.names import N as C")) == "n"


def test_where_it_is_written_is_known(read: Read, tmp_path: Path) -> None:
    callee = read("\n\nclass C:\n    def __init__(self, a): ...")
    assert (callee.file, callee.line, callee.is_class) == (str(tmp_path / "mine.py"), 3, True)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"def f(:\n", "invalid syntax|was never closed"),
        (b"# -*- coding: latin-1 -*-\n# M\xfcller\nclass D: pass\n", None),
        (b"\xef\xbb\xbfclass D: pass\n", None),
        (b"x = '\xff'\n", "cannot be read"),
        (b"# coding: no-such\n", "cannot be read|unknown encoding"),
        (b"x = 1\0\n", "null bytes"),
        (b"x = " + b"(" * 5000 + b")" * 5000, "too many nested parentheses|cannot be read"),
        (b"x = " + b"-" * 200_000 + b"1", "cannot be read"),
    ],
    ids=["syntax", "latin-1", "byte order mark", "not UTF-8", "unknown encoding", "NUL", "brackets", "minuses"],
)
def test_a_file_that_is_no_python_is_a_syntax_error_of_that_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, expected: str | None
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "broken.py").write_bytes(content)
    source = Source()
    if expected is None:
        assert isinstance(source.lookup("broken", "D"), Callee)
        return
    with pytest.raises(SyntaxError, match=expected) as caught:
        source.lookup("broken", "D")
    assert caught.value.filename == str(tmp_path / "broken.py")


def test_modules_are_found_where_python_finds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "space").mkdir()
    (tmp_path / "space" / "leaf.py").write_text("class C: pass")
    with zipfile.ZipFile(tmp_path / "zipped.zip", "w") as archive:
        archive.writestr("inzip.py", "class C: pass")
    monkeypatch.syspath_prepend(str(tmp_path / "zipped.zip"))
    source = Source()
    assert module_file("space") == (None, True)
    assert module_file("space.leaf") == (tmp_path / "space" / "leaf.py", False)
    assert module_file("space.no") is None
    assert module_file("space.leaf.deeper") is None
    assert isinstance(source.lookup("space.leaf", "C"), Callee)
    assert source.lookup("inzip", "C") == Dynamic("inzip", "C", certain=False)
    for name in ("os", "os.path", "sys", "json.decoder", "__main__", "", ".", "a b", "../mine", "no_such_module"):
        assert module_file(name) is None, name
    file = module_file("yaml._yaml")
    assert file is None or file.path is None, "compiled"


def test_nothing_is_imported() -> None:
    code = """
import sys
from dtrain.config.signatures import SOURCE
print(SOURCE.lookup("torch.optim", "AdamW").line > 0, SOURCE.lookup("torchmetrics", "Accuracy").line > 0)
print(sorted({"torch", "torchmetrics", "numpy"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert (done.stdout, done.stderr) == ("True True\n[]\n", "")
