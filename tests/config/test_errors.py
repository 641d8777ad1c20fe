"""The words of messages, and what a mistake is."""

import subprocess
import sys
from typing import Any

import pytest

from dtrain.config.did_you_mean import did_you_mean, nearest
from dtrain.config.errors import ConfigError, Mistake, Place, first_few, found, one_line


@pytest.mark.parametrize(
    ("count", "limit", "separator", "expected"),
    [
        (0, 3, ", ", ""),
        (3, 3, ", ", "a0, a1, a2"),
        (5, 3, ", ", "a0, a1, a2 and 2 more"),
        (3, 3, "; ", "a0; a1; a2"),
        (4, 3, "; ", "a0; a1; a2; and 1 more"),
    ],
)
def test_the_first_few_of_a_list(count: int, limit: int, separator: str, expected: str) -> None:
    assert first_few([f"a{index}" for index in range(count)], limit, separator) == expected


def test_nearest_names_ignore_case_and_come_best_first() -> None:
    assert nearest("crossentropyloss", ["BCELoss", "CrossEntropyLoss", "NLLLoss"])[0] == "CrossEntropyLoss"
    assert nearest("xyz", ["CrossEntropyLoss"]) == []
    assert did_you_mean("lrr", ["lr", "eps"]) == "; did you mean 'lr'?"
    assert did_you_mean("lr", []) == ""


@pytest.mark.parametrize(
    ("thing", "expected"),
    [
        (None, "found null"),
        (True, "found bool true"),
        (3, "found int 3"),
        (0.5, "found float 0.5"),
        ("x", "found string 'x'"),
        ([1, {"a": None}], "found list [1, {'a': None}]"),
        ({"a": 1}, "found mapping {'a': 1}"),
        ("x" * 200, f"found string '{'x' * 56}..."),
    ],
)
def test_a_value_in_a_message(thing: Any, expected: str) -> None:
    assert found(thing) == expected


def test_a_mistake_is_one_line_that_no_terminal_obeys() -> None:
    assert str(Mistake("a\n b\x1b[31m\u202e", Place("f\n.yaml", 3, 4))) == "f .yaml:3:4: a b\\x1b[31m\\u202e"
    assert one_line("\udcff") == "\\udcff"


def test_the_same_mistake_is_told_once() -> None:
    error = ConfigError([Mistake("a"), Mistake("b"), Mistake("a")])
    assert str(error) == "a\nb"
    assert ConfigError("text").mistakes == [Mistake("text")]


@pytest.mark.parametrize("module", ["dtrain.config", "dtrain.config.errors"])
def test_the_exception_alone_needs_no_parser_and_no_library(module: str) -> None:
    heavy = {"yaml", "ml_collections", "numpy", "rich", "torch", "mlflow", "dtrain.config.load"}
    code = f"import sys, {module}; {module}.ConfigError; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert (done.stdout, done.stderr) == ("[]\n", "")
