"""What a YAML text means, where each key stands in it, and what is refused: the reader under every config."""

# ruff: noqa: E501 - a case of a table is one line, so that message and cause stand together

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hostile import HOSTILE, bomb
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.config.errors import ConfigError, Place
from dtrain.config.yaml12 import dump, parse, scalar


def value(text: str) -> Any:
    return parse(text, "a.yaml")[0]


def mistakes(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(text, "a.yaml")
    return [str(one) for one in caught.value.mistakes]


# --------------------------------------------------------------------------- scalars by the core schema of YAML 1.2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-3", 0.001),  # YAML 1.1 as PyYAML reads it: a text
        ("1e-4", 0.0001),
        ("1E5", 100000.0),
        ("1e3", 1000.0),
        ("5.", 5.0),
        (".5", 0.5),
        ("-.5e1", -5.0),
        ("+3", 3),
        ("-0", 0),
        ("0", 0),
        ("010", 10),  # 8 in YAML 1.1
        ("0o10", 8),
        ("0x1F", 31),
        ("0b101", "0b101"),  # 5 in YAML 1.1
        ("1_000", "1_000"),  # 1000 in YAML 1.1
        ("1:30", "1:30"),  # 90 in YAML 1.1
        ("12:30:00", "12:30:00"),  # 45000 in YAML 1.1
        ("190:20:30.15", "190:20:30.15"),
        ("2024-01-02", "2024-01-02"),  # a date in YAML 1.1
        ("2001-12-14t21:59:43.10-05:00", "2001-12-14t21:59:43.10-05:00"),
        ("1.10", 1.1),
        ("1.2.3", "1.2.3"),
        ("yes", "yes"),  # true in YAML 1.1
        ("no", "no"),
        ("NO", "NO"),  # Norway
        ("on", "on"),
        ("off", "off"),
        ("y", "y"),
        ("true", True),
        ("True", True),
        ("TRUE", True),
        ("tRUE", "tRUE"),
        ("false", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("None", "None"),
        ("nan", "nan"),
        ("inf", "inf"),
        ("-.inf", -math.inf),
        (".INF", math.inf),
        ("1e999", "1e999"),  # no float holds it
        ("9" * 100, int("9" * 100)),
        ("9" * 101, "9" * 101),  # no setting has so many digits, and Python refuses to print 4301
        ("0x" + "f" * 5000, "0x" + "f" * 5000),
        ("'1e-3'", "1e-3"),
        ('"true"', "true"),
        ("!!str 1e-3", "1e-3"),
        ("!!float 1", 1.0),
        ("!!int 7", 7),
        ("!!bool true", True),
        ("!!null ~", None),
        ("=", "="),  # a value key in YAML 1.1
        ("a b  c", "a b  c"),
        ("C:\\temp", "C:\\temp"),
        ("sqlite:///a.db", "sqlite:///a.db"),
        ("a#b", "a#b"),
        ("a #b", "a"),
    ],
)
def test_a_scalar_means_what_yaml_1_2_says(text: str, expected: Any) -> None:
    read = value(f"k: {text}\n")["k"]
    assert (read, type(read)) == (expected, type(expected))


def test_not_a_number() -> None:
    assert math.isnan(value("k: .nan")["k"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("# only a comment\n", None),
        ("[1, a, null]", [1, "a", None]),
        ("- 1\n- [2, 3]\n", [1, [2, 3]]),
        ("{a: {b: 1}}", {"a": {"b": 1}}),
        ("a: |\n  x\n  y\n", {"a": "x\ny\n"}),
        ("a: >-\n  x\n  y\n", {"a": "x y"}),
        ("yes: 1\nno: 2\non: 3", {"yes": 1, "no": 2, "on": 3}),
        ("%YAML 1.1\n---\na: 010\n", {"a": 10}),
        ("a: &x {p: 1}\nb: *x\n", {"a": {"p": 1}, "b": {"p": 1}}),
        ("a: &x {p: 1, q: 2}\nb: {<<: *x, q: 3}\n", {"a": {"p": 1, "q": 2}, "b": {"p": 1, "q": 3}}),
        ("a: &x {p: 1, q: 2}\nb: {q: 3, <<: *x}\n", {"a": {"p": 1, "q": 2}, "b": {"p": 1, "q": 3}}),
        ("a: &x {p: 1}\nb: &y {p: 2, q: 2}\nc: {<<: [*x, *y]}", {"a": {"p": 1}, "b": {"p": 2, "q": 2}, "c": {"p": 1, "q": 2}}),
        ("é: ü\n日本: 1\n", {"é": "ü", "日本": 1}),
    ],
)  # fmt: skip
def test_a_document_means(text: str, expected: Any) -> None:
    assert value(text) == expected


def test_an_alias_is_a_copy() -> None:
    read = value("a: &x [1]\nb: *x\n")
    read["a"].append(2)
    assert read["b"] == [1]


# ------------------------------------------------------------------------------------------------------------ places


def test_every_key_and_list_element_has_its_place() -> None:
    _, places = parse("a: 1\nb:\n  c: [x, {d: 2}]\n", "f.yaml")
    assert places == {
        ("a",): Place("f.yaml", 1, 1),
        ("b",): Place("f.yaml", 2, 1),
        ("b", "c"): Place("f.yaml", 3, 3),
        ("b", "c", 0): Place("f.yaml", 3, 7),
        ("b", "c", 1): Place("f.yaml", 3, 10),
        ("b", "c", 1, "d"): Place("f.yaml", 3, 11),
    }


@pytest.mark.parametrize("own_first", [True, False])
def test_a_merged_key_has_the_place_of_the_one_that_won(own_first: bool) -> None:
    lines = ["  lr: 2", "  <<: *base"]
    text = "base: &base\n  lr: 1\n  eps: 3\nopt:\n" + "\n".join(lines if own_first else lines[::-1])
    read, places = parse(text, "f")
    assert read["opt"] == {"lr": 2, "eps": 3}
    assert places["opt", "lr"].line == (5 if own_first else 6)
    assert places["opt", "eps"].line == 3
    assert places["opt",].line == 4


def test_of_a_list_of_merged_mappings_the_first_has_value_and_place() -> None:
    read, places = parse("a: &a {k: [1]}\nb: &b {k: [2]}\nc: {<<: [*a, *b]}\n", "f")
    assert read["c"] == {"k": [1]}
    assert (places["c", "k"].line, places["c", "k", 0].line) == (1, 1)


def test_a_fixed_place_is_everywhere() -> None:
    _, places = parse("{a: [1]}", "x", Place("argument 'x'"))
    assert set(places.values()) == {Place("argument 'x'")}


# ----------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3\n", "a.yaml:3:1: duplicate key 'a', first written on line 1"),
        ("x:\n  a: 1\n  a: 1\n", "a.yaml:3:3: duplicate key 'x.a', first written on line 2"),
        ("{a: 1, a: 2}", "a.yaml:1:8: duplicate key 'a', first written on line 1"),
        ("1: a", "a.yaml:1:1: a key must be a string; put '1' in quotes"),
        ("true: a", "a.yaml:1:1: a key must be a string; put 'true' in quotes"),
        ("null: a", "a.yaml:1:1: a key must be a string; put 'null' in quotes"),
        ("1.5: a", "a.yaml:1:1: a key must be a string; put '1.5' in quotes"),
        ("[a, b]: 1", "a.yaml:1:1: a key must be a string, found a list"),
        ("? {a: 1}\n: 2", "a.yaml:1:3: a key must be a string, found a mapping"),
        ("a.b: 1", "a.yaml:1:1: the key 'a.b' contains a dot; nest the keys instead (dots are for the command line)"),
        ("__class__: 1", "a.yaml:1:1: '__class__' cannot be a key"),
        ("'': 1", "a.yaml:1:1: '' cannot be a key"),
        ('"a\\x1b": 1', "a.yaml:1:1: 'a\\x1b' cannot be a key"),
        ("a" * 101 + ": 1", f"a.yaml:1:1: '{'a' * 56}... cannot be a key"),
        ("a: {b: 1", "a.yaml:1:9: not valid YAML: expected ',' or '}', but got '<stream end>' (while parsing a flow mapping)"),
        ("a: [1", "a.yaml:1:6: not valid YAML: expected ',' or ']', but got '<stream end>' (while parsing a flow sequence)"),
        ("a: 1\n b: 2", "a.yaml:2:3: not valid YAML: mapping values are not allowed here"),
        ("a: b: c", "a.yaml:1:5: not valid YAML: mapping values are not allowed here"),
        ("a:\n\tb: 1", "a.yaml:2:1: not valid YAML: found character '\\t' that cannot start any token (while scanning for the next token); indent with spaces"),
        ("a: *x", "a.yaml:1:4: not valid YAML: found undefined alias 'x'"),
        ("a: 'x", "a.yaml:1:6: not valid YAML: found unexpected end of stream (while scanning a quoted scalar)"),
        ("a: 1\n---\nb: 2", "a.yaml:2:1: not valid YAML: a second document begins here; a config is one"),
        ("a: @x", "a.yaml:1:4: not valid YAML: found character '@' that cannot start any token (while scanning for the next token)"),
        ("a: {T: ${b.c}}", "a.yaml:1:9: not valid YAML: expected ',' or '}', but got '{' (while parsing a flow mapping); inside {...} or [...] a reference needs quotes: '${...}'"),
        ("a: 1\nb: x\0y", "a.yaml:2:5: not valid YAML: the character '\\x00' is not allowed"),
        ("a: \x07", "a.yaml:1:4: not valid YAML: the character '\\x07' is not allowed"),
        ("a: !!python/object/apply:os.system [id]", "a.yaml:1:4: the tag 'python/object/apply:os.system' is not allowed; a config holds plain values, lists and mappings only"),
        ("a: !!python/name:os.system", "a.yaml:1:4: the tag 'python/name:os.system' is not allowed; a config holds plain values, lists and mappings only"),
        ("a: !!python/tuple [1]", "a.yaml:1:4: the tag 'python/tuple' is not allowed; a config holds plain values, lists and mappings only"),
        ("a: !!binary aGk=", "a.yaml:1:4: the tag 'binary' is not allowed; a config holds plain values, lists and mappings only"),
        ("a: !!timestamp 2024-01-01", "a.yaml:1:4: the tag 'timestamp' is not allowed; a config holds plain values, lists and mappings only"),
        ("a: !!set {x, y}", "a.yaml:1:4: the tag 'set' is not allowed; a config holds plain values, lists and mappings only"),
        ("a: !my.Thing 1", "a.yaml:1:4: the tag '!my.Thing' is not allowed; a config holds plain values, lists and mappings only"),
        ("!x a: 1", "a.yaml:1:1: the tag '!x' is not allowed; a config holds plain values, lists and mappings only"),
        ("a: !!int 1.5", "a.yaml:1:4: '1.5' is not an integer"),
        ("a: !!int true", "a.yaml:1:4: 'true' is not an integer"),
        (
            "a:\n b: 1\n\n  c: 2",
            "a.yaml:4:4: not valid YAML: mapping values are not allowed here; this line is indented by 2 spaces, the one above it by 1",
        ),
        ("a: !!bool yes", "a.yaml:1:4: 'yes' is not true or false"),
        ("a: !!float x", "a.yaml:1:4: 'x' is not a number"),
        ("a: !!map [1]", "a.yaml:1:4: the tag 'map' is not allowed; a config holds plain values, lists and mappings only"),
        ("<<: 3", "a.yaml:1:5: '<<' takes a mapping or a list of mappings"),
        ("a: &a {b: 1, <<: *a}", "a.yaml:1:4: '<<' merges a mapping into itself"),
        ("a: &a [*a]", "a.yaml:1:4: nesting deeper than 50; this is not a config"),
        ("%YAML 3.0\n---\na: 1", "a.yaml:1:1: not valid YAML: found incompatible YAML document (version 1.* is required)"),
    ],
)  # fmt: skip
def test_one_line_says_what_is_wrong_and_where(text: str, expected: str) -> None:
    assert expected in mistakes(text)[0]
    assert "\n" not in mistakes(text)[0]


def test_all_mistakes_of_a_document_are_told() -> None:
    assert mistakes("a: 1\na: 2\n3: 4\nb: !x 1\n") == [
        "a.yaml:2:1: duplicate key 'a', first written on line 1",
        "a.yaml:3:1: a key must be a string; put '3' in quotes",
        "a.yaml:4:4: the tag '!x' is not allowed; a config holds plain values, lists and mappings only",
    ]


@pytest.mark.slow
def test_a_hostile_text_is_refused_in_little_time_and_memory() -> None:
    code = f"""
import json, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (2 * 2**30,) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (40, 40))  # seconds; a tenth of it is enough
sys.path.insert(0, {json.dumps(str(Path(__file__).parents[1]))})
from hostile import HOSTILE, bomb
from dtrain.config.errors import ConfigError
from dtrain.config.yaml12 import parse
for name, text in HOSTILE.items():
    try:
        parse(text, "a.yaml")
    except ConfigError as error:
        print(json.dumps([name, str(error)]))
status = open("/proc/self/status").read()  # getrusage's peak begins with what the parent held when it forked
print(json.dumps(["peak", int(status.partition("VmHWM:")[2].split()[0]) / 1024]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    *told, peak = (json.loads(line) for line in done.stdout.splitlines())
    assert [name for name, _ in told] == list(HOSTILE)
    assert all(len(message) < 300 and "\n" not in message for _, message in told)
    assert peak[1] < 500, "MB"


def test_an_alias_bomb_says_what_it_is() -> None:
    assert mistakes(bomb(9))[0].endswith("more than 20000 values (aliases expanded); this is not a config")


# ------------------------------------------------------------------------------------------------------- there and back

TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufeff\ufffe\uffff"))
PLAIN = st.sampled_from(["1e-3", "on", "010", "1:30", "null", "~", "", "- a", "a: b", "#x", "&a", "*a", "!x", "%", "@", "`", " x ", "x\ny", "=", "<<", "{", "2024-01-01", "0o7", "1_0", ".5", "1e999"])  # fmt: skip
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS | PLAIN
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4), max_leaves=15
)


@given(VALUES)
@settings(max_examples=200, deadline=None)
def test_what_is_written_is_read_back(values: Any) -> None:
    written = dump({"k": values})
    if '"k":' not in written and all(key_is_allowed(key) for key in keys_of(values)):
        read = value(written)["k"]
        assert read == values
        assert repr(read) == repr(values)  # 1 == 1.0 == True
    assert yaml.safe_load(written) == {"k": values} or "<<" in written  # and by those who read YAML 1.1


def keys_of(values: Any) -> list[str]:
    inner = values.values() if isinstance(values, dict) else values if isinstance(values, list) else []
    return [*(values if isinstance(values, dict) else []), *(key for item in inner for key in keys_of(item))]


def key_is_allowed(key: str) -> bool:
    return bool(key) and "." not in key and key.isprintable() and not key.startswith("__") and key != "<<"


@given(st.text(max_size=30))
@settings(max_examples=300, deadline=None)
def test_any_text_gives_a_value_or_mistakes_of_one_line(text: str) -> None:
    try:
        parse(text, "a.yaml")
    except ConfigError as error:
        assert all("\n" not in str(one) and str(one).isprintable() for one in error.mistakes)


@given(st.text(st.sampled_from("0123456789.eE+-xo_:infaN~"), max_size=12))
@settings(max_examples=300, deadline=None)
def test_a_number_is_never_made_of_something_else(text: str) -> None:
    read = scalar(text)
    if isinstance(read, int | float) and "x" not in text and "o" not in text and not text.strip("+-").startswith("."):
        assert float(text) == read
