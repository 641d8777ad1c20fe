"""From files, `_base_`, `${...}`, other dialects and KEY=VALUE to one locked config whose keys know their places."""

# ruff: noqa: E501 - a case of a table is one line, so that message and cause stand together

import math
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from dtrain.config.errors import ConfigError, to_plain
from dtrain.config.load import from_mapping, load_config, place_of, sources, to_config_dict, to_yaml


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test works in a folder of its own, so that messages name plain files."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(text: str, name: str = "c.yaml") -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text, encoding="utf-8")
    return name


def load(text: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain values that a file of this text holds."""
    return to_plain(load_config(write(text), overrides))


def told(text: str, overrides: Sequence[str] = ()) -> list[str]:
    """The messages that a file of this text gives."""
    with pytest.raises(ConfigError) as caught:
        load_config(write(text), overrides)
    return str(caught.value).split("\n")


def place(text: str, key: str, overrides: Sequence[str] = ()) -> str:
    path = tuple(int(part) if part.isdecimal() else part for part in key.split("."))
    return str(place_of(load_config(write(text), overrides), path))


# ---------------------------------------------------------------------------------------------------------- the result


def test_the_result_is_a_locked_config_dict_at_every_depth() -> None:
    config = load_config(write("model: {name: ViT, blocks: [{dim: 1}, [{dim: 2}]]}\n"))
    assert isinstance(config, ConfigDict)
    assert config.model.name == "ViT"
    assert config.model.blocks[0].dim == 1
    assert config.model.blocks[1][0].dim == 2
    for inner in (config, config.model, config.model.blocks[0], config.model.blocks[1][0]):
        assert isinstance(inner, ConfigDict)
        assert inner.is_locked
        with pytest.raises((KeyError, AttributeError)):
            inner.new = 1


def test_keys_keep_the_order_in_which_they_are_written() -> None:
    assert list(load("z: 1\nexperiment: e\na: {y: 1, b: 2}\n")["a"]) == ["y", "b"]


def test_the_experiment_is_the_files_stem_unless_it_has_a_name() -> None:
    assert load_config(write("seed: 1", "runs/vit small.yaml")).experiment == "vit small"
    assert load("experiment: null\n")["experiment"] == "c"
    assert load("experiment: digits\n")["experiment"] == "digits"
    assert load("seed: 1\n", ["experiment=x"])["experiment"] == "x"
    assert load("experiment: digits\n", ["experiment="])["experiment"] == "c"


def test_a_config_survives_copies_pickles_and_a_second_reading() -> None:
    config = load_config(write("a: {b: [1, {c: 2}]}\n"))
    assert to_plain(pickle.loads(pickle.dumps(config))) == to_plain(config)
    assert from_mapping(config) is config
    assert to_plain(from_mapping(ConfigDict(config))) == to_plain(config)


def test_the_texts_are_kept_as_they_were_written() -> None:
    write("seed: 1  # from the base\n", "sub/c.yaml")
    text = "_base_: sub/c.yaml\nmodel: {name: x}  # mine\n"
    config = load_config(write(text), ["seed=2", "model.a=3"])
    assert sorted(sources(config).values()) == sorted(["seed: 1  # from the base\n", text, "seed=2\nmodel.a=3\n"])
    assert sources(config)["overrides.txt"] == "seed=2\nmodel.a=3\n"


# ------------------------------------------------------------------------------------------------- files and `_base_`


def test_a_base_lies_under_the_file() -> None:
    write("optimizer: {name: AdamW, lr: 1, betas: [1, 2]}\nseed: 1\n", "base.yaml")
    read = load("_base_: base.yaml\noptimizer: {lr: 2, betas: [3]}\n")
    assert read == {"optimizer": {"name": "AdamW", "lr": 2, "betas": [3]}, "seed": 1, "experiment": "c"}


def test_bases_chain_and_their_names_are_relative_to_the_file_that_names_them() -> None:
    write("_base_: ../root.yaml\na: {x: 2}\n", "sub/middle.yaml")
    write("a: {x: 1, y: 1, z: 1}\nb: 1\n", "root.yaml")
    assert load("_base_: sub/middle.yaml\na: {z: 3}\n") == {"a": {"x": 2, "y": 1, "z": 3}, "b": 1, "experiment": "c"}


def test_of_several_bases_the_later_wins() -> None:
    write("a: 1\nb: 1\n", "one.yaml")
    write("b: 2\nc: 2\n", "two.yaml")
    assert load("_base_: [one.yaml, two.yaml]\nc: 3\n") == {"a": 1, "b": 2, "c": 3, "experiment": "c"}


def test_delete_drops_what_lies_below() -> None:
    write("optimizer: {name: AdamW, lr: 1, betas: [1, 2]}\nmodel: {block: {a: 1, b: {c: 1}}}\n", "base.yaml")
    read = load(
        "_base_: base.yaml\noptimizer: {_delete_: true, name: SGD}\nmodel: {block: {b: {_delete_: true, d: 1}}}\n"
    )
    assert read["optimizer"] == {"name": "SGD"}
    assert read["model"] == {"block": {"a": 1, "b": {"d": 1}}}


def test_delete_is_no_key_of_the_result_where_nothing_lies_below() -> None:
    assert load("a: {_delete_: true, b: {_delete_: false, c: 1}}\n")["a"] == {"b": {"c": 1}}


def test_a_base_in_another_dialect_merges_with_the_canonical_names() -> None:
    write("trainer: {max_num_epochs: 5, optimizer: {learning_rate: 1}}\nmanual_seed: 3\n", "base.yaml")
    read = load("_base_: base.yaml\ntrainer: {max_epochs: 7}\noptimizer: {name: SGD}\n")
    assert read["trainer"] == {"max_epochs": 7}
    assert read["optimizer"] == {"lr": 1, "name": "SGD"}
    assert read["seed"] == 3


def test_a_base_may_be_named_through_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    write("seed: 5\n", "bases/b.yaml")
    monkeypatch.setenv("BASES", "bases")
    assert load("_base_: ${BASES}/b.yaml\n")["seed"] == 5


def test_a_byte_order_mark_is_no_part_of_the_first_key() -> None:
    Path("c.yaml").write_bytes(b"\xef\xbb\xbfseed: 1\n")
    assert load_config("c.yaml").seed == 1


def test_windows_line_ends_are_line_ends() -> None:
    Path("c.yaml").write_bytes(b"seed: 1\r\na: x\r\n")
    assert load_config("c.yaml").a == "x"
    assert str(place_of(load_config("c.yaml"), ("a",))) == "c.yaml:2:1"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "c.yaml:1:1: the file is empty; a config is a mapping of sections (model, loaders, ...)"),
        ("# nothing\n", "c.yaml:1:1: the file is empty; a config is a mapping of sections (model, loaders, ...)"),
        ("- a\n", "c.yaml:1:1: the file holds a list; a config is a mapping of sections (model, loaders, ...)"),
        ("text\n", "c.yaml:1:1: the file holds a string; a config is a mapping of sections (model, loaders, ...)"),
        ("a: 1\n_base_: bsae.yaml\n", "c.yaml:2:1: there is no file bsae.yaml; did you mean 'base.yaml'?"),
        ("_base_: c.yaml\n", "c.yaml:1:1: circular reference in '_base_': c.yaml is already being read"),
        ("_base_: back.yaml\n", "back.yaml:1:1: circular reference in '_base_': c.yaml is already being read"),
        ("_base_: 3\n", "c.yaml:1:1: _base_: expected a file name or a list of them, found int 3"),
        ("_base_:\n- base.yaml\n- 3\n", "c.yaml:3:3: _base_: expected a file name or a list of them, found int 3"),
        ("_base_: {a: 1}\n", "c.yaml:1:1: _base_: expected a file name or a list of them, found mapping {'a': 1}"),
        ("_base_: folder\n", "c.yaml:1:1: folder is a folder, expected a YAML file"),
        ("_base_: dup.yaml\n", "dup.yaml:1:8: duplicate key"),
        ("_base_: list.yaml\n", "list.yaml:1:1: the file holds a list"),
        (
            "_base_: ${DTRAIN_NOWHERE}.yaml\n",
            "c.yaml:1:1: _base_: '${DTRAIN_NOWHERE}': the environment has no variable",
        ),
        ("_base_: twice0.yaml\n", "c.yaml:1:1: more than 100 files under '_base_'"),
        ("a: {_delete_: yes}\n", "c.yaml:1:5: a._delete_: expected true or false, found string 'yes'"),
    ],
)
def test_a_bad_file_or_base_is_one_line(text: str, expected: str) -> None:
    write("a: 1\n", "base.yaml")
    write("_base_: c.yaml\n", "back.yaml")
    write("- 1\n", "list.yaml")
    Path("dup.yaml").write_text("{a: 1, a: 2}")
    Path("folder").mkdir()
    for level in range(30):  # each file reads the next one twice: a billion readings
        write(f"_base_: [twice{level + 1}.yaml, twice{level + 1}.yaml]\n", f"twice{level}.yaml")
    write("a: 1\n", "twice30.yaml")
    lines = told(text)
    assert len(lines) == 1
    assert lines[0].startswith(expected)


def test_all_bases_that_are_missing_are_told() -> None:
    assert told("_base_: [first, second]\n") == [
        "c.yaml:1:10: there is no file first",
        "c.yaml:1:17: there is no file second",
    ]


def test_files_that_are_no_config_are_refused_unread(here: Path) -> None:
    Path("image.yaml").write_bytes(bytes(range(256)) * 10)
    Path("latin.yaml").write_bytes("a: 1\nname: M\xfcller\n".encode("latin-1"))
    Path("utf16.yaml").write_bytes("a: 1\n".encode("utf-16"))
    Path("zeros.yaml").write_bytes(b"\0" * 10)
    with Path("large.yaml").open("wb") as file:
        file.truncate(100_000_000)
    Path("loop.yaml").symlink_to("loop.yaml")
    Path("run").mkdir()
    Path("run/config.yaml").write_text("a: 1\n")
    expected = {
        "image.yaml": "image.yaml:2:118: not UTF-8 text: byte 0x80",
        "latin.yaml": "latin.yaml:2:8: not UTF-8 text: byte 0xfc",
        "utf16.yaml": "utf16.yaml:1:1: not UTF-8 text: byte 0xff",
        "zeros.yaml": "zeros.yaml:1:1: not valid YAML: the character '\\x00' is not allowed",
        "large.yaml": "large.yaml is larger than 1 MB; this is not a config",
        "/dev/zero": "/dev/zero is larger than 1 MB; this is not a config",
        "loop.yaml": "cannot read loop.yaml: Too many levels of symbolic links",
        ".": ". is a folder, expected a YAML file",
        "run": "run is a folder, expected a YAML file; a run's config is run/config.yaml",
        "latin.yam": "there is no file latin.yam; did you mean 'latin.yaml'?",
        "no/such/file.yaml": "there is no file no/such/file.yaml",
        "a\0b": "cannot read 'a\\x00b': embedded null byte",
        "x" * 300: f"cannot read {'x' * 300}: File name too long",
        "latin.yaml/x": "cannot read latin.yaml/x: Not a directory",
        "new\nline": "there is no file new line",
    }
    messages = {}
    for name in expected:
        with pytest.raises(ConfigError) as caught:
            load_config(name)
        messages[name] = str(caught.value)
    assert messages == expected


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unreadable to root")
def test_an_unreadable_file_is_one_line() -> None:
    Path(write("a: 1\n")).chmod(0)
    assert told("a: 1\n") == ["cannot read c.yaml: Permission denied"]


# ------------------------------------------------------------------------------------------------------------ `${...}`


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("UNSET", "a", "seed"):
        monkeypatch.delenv(name, raising=False)
    for name, text in {
        "N": "64",
        "LR": "1e-3",
        "HOST": "node1",
        "EMPTY": "",
        "YES": "true",
        "JOB": "1e5",
        "ODD": "${x}",
    }.items():
        monkeypatch.setenv(name, text)


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("${N}", 64),
        ("${LR}", 0.001),
        ("${YES}", True),
        ("${HOST}", "node1"),
        ("'${HOST}'", "node1"),
        ("${EMPTY}", None),
        ("run-${N}-${HOST}", "run-64-node1"),
        ("x${JOB}", "x1e5"),  # as it is, not the number 100000.0
        ("x${EMPTY}y", "xy"),
        ("${UNSET:-3}", 3),
        ("${UNSET:-}", None),
        ("${UNSET:-a b}", "a b"),
        ("${UNSET:-a:-b}", "a:-b"),
        ("${UNSET:-$5}", "$5"),
        ("${N:-3}", 64),
        ("${EMPTY:-3}", 3),  # as in the shell
        ("x${UNSET:-1e5}", "x1e5"),
        ("${ N }", 64),
        ("${a.b}", 1),
        ("${a.c}", [1, {"d": 2}]),
        ("${a.c.1.d}", 2),
        ("${a.c.0}", 1),
        ("${a}", {"b": 1, "c": [1, {"d": 2}], "e": None, "f": True, "g": 0.5, "h": "text"}),
        ("${a.e}", None),
        ("x${a.e}y", "xy"),
        ("x${a.f}", "xtrue"),
        ("x${a.g}", "x0.5"),
        ("${a.nope:-7}", 7),
        ("${a.b:-7}", 1),
        ("${later.key}", "1e-9"),
        ("${later.indirect}", 1),
        ("$${N}", "${N}"),
        ("$$${N}", "$${N}"),
        ("a$b $ {x} $", "a$b $ {x} $"),
        ("${ODD}", "${x}"),  # what the environment holds is no config
        ("$${a} ${a.b}", "${a} 1"),
        ("[1, '${a.b}', {x: '${N}'}]", [1, 1, {"x": 64}]),
        ("{x: '${a.c}'}", {"x": [1, {"d": 2}]}),
        ("${seed}", 5),  # a key of the top level, where the environment has no such name
        ("${seed:-6}", 6),  # with a default it is the environment's alone
    ],
)
def test_a_reference_stands_for(text: str, expected: Any) -> None:
    a = "a: {b: 1, c: [1, {d: 2}], e: null, f: true, g: 0.5, h: text}"
    read = load(f"k: {text}\n{a}\nseed: 5\nlater: {{key: '1e-9', indirect: '${{a.b}}'}}\n")["k"]
    assert (read, type(read)) == (expected, type(expected))


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("k: ${UNSET}", "c.yaml:1:1: k: '${UNSET}': the environment has no variable 'UNSET'; set it, or write ${UNSET:-default}"),
        ("k: ${a.x}\na: {y: 1}", "c.yaml:1:1: k: '${a.x}': there is no such key; did you mean 'a.y'?"),
        ("k: ${a.b.c}\na: {b: 1}", "c.yaml:1:1: k: '${a.b.c}': there is no such key"),
        ("k: ${a.2}\na: [1]", "c.yaml:1:1: k: '${a.2}': there is no such key"),
        ("k: x${a.b}\na: {b: [1]}", "c.yaml:1:1: k: '${a.b}' is a list; it must stand alone"),
        ("k: x${a}\na: {b: 1}", "c.yaml:1:1: k: '${a}' is a mapping; it must stand alone"),
        ("k: ${}", "c.yaml:1:1: k: '${}' is not a valid reference; write ${NAME}, ${NAME:-default} or ${section.key}, and $${ for a plain ${"),
        ("k: ${a b}", "c.yaml:1:1: k: '${a b}' is not a valid reference; write ${NAME}"),
        ("k: ${:-3}", "c.yaml:1:1: k: '${:-3}' is not a valid reference; write ${NAME}"),
        ("k: ${N", "c.yaml:1:1: k: '${N': a '${' without its '}'; write ${NAME}"),
        ("k: ${N:-${HOST}}", "c.yaml:1:1: k: '${N:-${HOST}}': a '${' without its '}'; write ${NAME}"),
        ("k: {m: ['x', '${UNSET}']}", "c.yaml:1:14: k.m.1: '${UNSET}': the environment has no variable 'UNSET'"),
        ("k: ${k.x}", "c.yaml:1:1: k: '${k.x}': there is no such key"),
        ("k: {x: '${k.x}'}", "c.yaml:1:5: k.x: circular reference: k.x -> k.x"),
        ("k: {x: '${k}'}", "c.yaml:1:5: k.x: circular reference: k.x -> k.x"),
        ("k: {a: '${k.b}', b: '${k.c}', c: '${k.a}'}", "c.yaml:1:5: k.a: circular reference: k.a -> k.b -> k.c -> k.a"),
    ],
)  # fmt: skip
def test_a_reference_to_nothing_or_itself_is_one_line(text: str, expected: str) -> None:
    assert told(text)[0].startswith(expected)


def test_references_are_all_told_together() -> None:
    assert len(told("a: ${NOPE_1}\nb: x${NOPE_2}\nc: ['${a.b.c}']\n")) == 3


@pytest.mark.usefixtures("environment")
def test_a_name_of_digits_in_the_environment_is_a_name() -> None:
    read = load("experiment: ${JOB}\nrun_name: ${N}\n")
    assert (read["experiment"], read["run_name"]) == ("1e5", "64")


@pytest.mark.parametrize(
    "text",
    [
        "x0: [1]\n" + "".join(f"x{i}: ['${{x{i - 1}}}', '${{x{i - 1}}}']\n" for i in range(1, 40)),
        "x0: text\n" + "".join(f"x{i}: '${{x{i - 1}}}${{x{i - 1}}}'\n" for i in range(1, 60)),
        "x0: text\n" + "".join(f"x{i}: '${{x{i - 1}}}'\n" for i in range(1, 3000)),
    ],
    ids=["lists", "texts", "chain"],
)
def test_references_cannot_grow_without_end(text: str) -> None:
    assert told(text)[-1].endswith("references grow without end; this is not a config")


def test_a_referenced_mapping_is_a_copy_with_a_place() -> None:
    config = load_config(write("a: {b: [1]}\nc: ${a}\n"))
    assert config.c.b is not config.a.b
    assert str(place_of(config, ("c", "b", 0))) == "c.yaml:2:1"


# ----------------------------------------------------------------------------------------------------------- overrides

BASE = """\
optimizer: {name: AdamW, lr: 1, betas: [0.9, 0.999]}
loaders:
  name: D
  train: {transforms: [{name: Flip, p: 0.5}, {name: Noise}]}
trainer: {max_epochs: 1}
none: null
"""


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("optimizer.lr=1e-3", "optimizer.lr", 0.001),
        ("optimizer.lr=", "optimizer.lr", None),
        ("optimizer.name='1'", "optimizer.name", "1"),
        ("optimizer.weight_decay=0.1", "optimizer.weight_decay", 0.1),
        ("optimizer.betas.1=0.5", "optimizer.betas", [0.9, 0.5]),
        ("optimizer.betas=[1, 2]", "optimizer.betas", [1, 2]),
        ("loaders.train.transforms.1.p=0.2", "loaders.train.transforms", [{"name": "Flip", "p": 0.5}, {"name": "Noise", "p": 0.2}]),
        ("loaders.train.transforms.0={name: Crop}", "loaders.train.transforms.0", {"name": "Crop"}),
        ("optimizer={name: SGD, lr: 2}", "optimizer", {"name": "SGD", "lr": 2}),
        ("optimizer={_delete_: true, name: SGD, lr: 2}", "optimizer", {"name": "SGD", "lr": 2}),
        ("model.encoder.depth=3", "model", {"encoder": {"depth": 3}}),
        ("none.a.b=1", "none", {"a": {"b": 1}}),
        ("run_name=a=b", "run_name", "a=b"),
        ("run_name=x: y", "run_name", {"x": "y"}),
        ("run_name='x: y'", "run_name", "x: y"),
        ("run_name=${optimizer.name}-1", "run_name", "AdamW-1"),
        ("mlflow.tracking_uri=sqlite:///a.db", "mlflow.tracking_uri", "sqlite:///a.db"),
        # in other dialects
        ("loaders.valid.batch_size=3", "loaders.val.batch_size", 3),
        ("loaders.dataset=E", "loaders.name", "E"),
        ("trainer.max_num_epochs=9", "trainer.max_epochs", 9),
        ("trainer.optimizer.learning_rate=5", "optimizer.lr", 5),
        ("optimizer.learning_rate=5", "optimizer.lr", 5),
        ("manual_seed=7", "seed", 7),
        ("trainer.eval_score_higher_is_better=false", "trainer.mode", "min"),
        ("mlflow_path=x", "mlflow.tracking_uri", "x"),
        ("trainer={max_num_iterations: 3, eval_score_higher_is_better: true}", "trainer", {"max_steps": 3, "mode": "max"}),
        ("optimizer={name: SGD, learning_rate: 2}", "optimizer", {"name": "SGD", "lr": 2}),
        ("eval_metric={names: [A], multiple: false}", "metrics", {"name": ["A"]}),
    ],
)  # fmt: skip
def test_an_override_sets(override: str, key: str, expected: Any) -> None:
    read: Any = load(BASE, [override])
    for part in key.split("."):
        read = read[int(part) if isinstance(read, list) else part]
    assert read == expected


def test_of_two_overrides_the_later_wins() -> None:
    assert load(BASE, ["optimizer.lr=2", "optimizer.lr=3"])["optimizer"]["lr"] == 3
    assert load(BASE, ["optimizer={name: SGD}", "optimizer.lr=3"])["optimizer"] == {"name": "SGD", "lr": 3}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("lr", "argument 'lr': expected KEY=VALUE with dots between keys, such as optimizer.lr=1e-3"),
        ("=3", "argument '=3': expected KEY=VALUE with dots between keys, such as optimizer.lr=1e-3"),
        (".a=3", "argument '.a=3': expected KEY=VALUE with dots between keys, such as optimizer.lr=1e-3"),
        ("a.=3", "argument 'a.=3': expected KEY=VALUE with dots between keys, such as optimizer.lr=1e-3"),
        ("a..b=3", "argument 'a..b=3': expected KEY=VALUE with dots between keys, such as optimizer.lr=1e-3"),
        ("optimizer.lr.x=3", "argument 'optimizer.lr.x=3': 'optimizer.lr' is 1, so it has no key 'x'"),
        ("optimizer.name.x=3", "argument 'optimizer.name.x=3': 'optimizer.name' is 'AdamW', so it has no key 'x'"),
        ("optimizer.betas.2=3", "argument 'optimizer.betas.2=3': 'optimizer.betas' is a list: '2' is not one of its indices (0 to 1)"),
        ("optimizer.betas.-1=3", "argument 'optimizer.betas.-1=3': 'optimizer.betas' is a list: '-1' is not one of its indices (0 to 1)"),
        ("optimizer.betas.x=3", "argument 'optimizer.betas.x=3': 'optimizer.betas' is a list: 'x' is not one of its indices (0 to 1)"),
        ("empty.0=3", "argument 'empty.0=3': 'empty' is a list: '0' is not one of its indices (none, it is empty)"),
        ("a=[1", "argument 'a=[1': not valid YAML: expected ',' or ']', but got '<stream end>' (while parsing a flow sequence)"),
        ("a={b: 1, b: 2}", "argument 'a={b: 1, b: 2}': duplicate key 'b'"),
        ("a=!x 1", "argument 'a=!x 1': the tag '!x' is not allowed; a config holds plain values, lists and mappings only"),
        ("a={1: 2}", "argument 'a={1: 2}': a key must be a string; put '1' in quotes"),
        ("__class__=1", "argument '__class__=1': '__class__' cannot be a key"),
        ("a\n.b=1", "argument 'a\\n.b=1': 'a\\n' cannot be a key"),
        ("a=${b.c}", "argument 'a=${b.c}': a: '${b.c}': there is no such key"),
        ("trainer={optimizer: {name: SGD}}", "argument 'trainer={optimizer: {name: SGD}}': 'trainer.optimizer' and 'optimizer' are two names for one setting; keep one of them"),
        ("a=" + "x" * 5000 + "[", "argument 'a=" + "x" * 54 + "...: "),
        ("a=\udcff", "argument 'a=\\udcff': not valid YAML: the character '\\udcff' is not allowed"),
    ],
)  # fmt: skip
def test_a_bad_override_is_one_line(override: str, expected: str) -> None:
    if override.startswith("a=x"):  # a long text is a value like any other; only its place in a message is cut
        assert place(BASE, "a", [override]).startswith(expected.removesuffix(": "))
        return
    lines = told(BASE + "empty: []\n", [override])
    assert lines == [expected]


def test_all_bad_overrides_are_told_together() -> None:
    assert len(told(BASE, ["lr", "optimizer.lr.x=1", "a=[", "seed=1"])) == 3


# ------------------------------------------------------------------------------------------------------------- dialects


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("manual_seed: 3", {"seed": 3}),
        ("eval_metric: {name: A}", {"metrics": {"name": "A"}}),
        ("metrics: {names: [A, B]}", {"metrics": {"name": ["A", "B"]}}),
        ("eval_metric: {names: [A], multiple: true, A: {x: 1}}", {"metrics": {"name": ["A"], "A": {"x": 1}}}),
        ("trainer: {optimizer: {name: A}}", {"optimizer": {"name": "A"}, "trainer": {}}),
        ("trainer: {lr_scheduler: {name: A}}", {"lr_scheduler": {"name": "A"}, "trainer": {}}),
        ("optimizer: {learning_rate: 1}", {"optimizer": {"lr": 1}}),
        ("trainer: {optimizer: {learning_rate: 1}}", {"optimizer": {"lr": 1}, "trainer": {}}),
        ("loaders: {dataset: D}", {"loaders": {"name": "D"}}),
        ("loaders: {valid: {x: 1}}", {"loaders": {"val": {"x": 1}}}),
        ("loaders: {valid: {dataset: D}}", {"loaders": {"val": {"name": "D"}}}),
        ("loaders: {train: {dataset: D}, test: {dataset: E}}", {"loaders": {"train": {"name": "D"}, "test": {"name": "E"}}}),
        ("trainer: {max_num_epochs: 3}", {"trainer": {"max_epochs": 3}}),
        ("trainer: {max_num_iterations: 3}", {"trainer": {"max_steps": 3}}),
        ("trainer: {validate_after_iters: 3}", {"trainer": {"validate_every_steps": 3}}),
        ("trainer: {log_after_iters: 3}", {"trainer": {"log_every_steps": 3}}),
        ("trainer: {eval_score_higher_is_better: true}", {"trainer": {"mode": "max"}}),
        ("trainer: {eval_score_higher_is_better: False}", {"trainer": {"mode": "min"}}),
        ("trainer: {pre_trained: a.pt}", {"trainer": {"pre_trained": "a.pt"}}),
        ("trainer: {mlflow_path: m, experiment_name: e}", {"mlflow": {"tracking_uri": "m"}, "experiment": "e", "trainer": {}}),
        ("mlflow_path: m\nexperiment_name: e", {"mlflow": {"tracking_uri": "m"}, "experiment": "e"}),
        ("mlflow: {mlflow_path: m, experiment_name: e}", {"mlflow": {"tracking_uri": "m"}, "experiment": "e"}),
        ("mlflow: null\nmlflow_path: m", {"mlflow": {"tracking_uri": "m"}}),
    ],
)  # fmt: skip
def test_another_dialect_means(text: str, expected: dict[str, Any]) -> None:
    assert load(text) == {"experiment": "c"} | expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 1\nmanual_seed: 2", "c.yaml:2:1: 'manual_seed' and 'seed' are two names for one setting; keep one of them"),
        ("optimizer: {}\ntrainer: {optimizer: {}}", "c.yaml:2:11: 'trainer.optimizer' and 'optimizer' are two names for one setting; keep one of them"),
        ("mlflow: 3\nmlflow_path: x", "c.yaml:2:1: mlflow_path: stands for 'mlflow.tracking_uri', but 'mlflow' is not a mapping"),
    ],
)  # fmt: skip
def test_two_names_of_one_setting_are_a_mistake(text: str, expected: str) -> None:
    assert told(text) == [expected]


def test_all_double_names_are_told() -> None:
    assert len(told("seed: 1\nmanual_seed: 2\ntrainer: {max_epochs: 1, max_num_epochs: 2}\n")) == 2


# --------------------------------------------------------------------------------------------------------------- places


def test_places_after_merges_renames_references_and_overrides() -> None:
    write("optimizer:\n  name: AdamW\n  lr: 1\nmodel: {a: {b: [1, 2]}}\n", "base.yaml")
    text = "_base_: base.yaml\noptimizer:\n  lr: 2\nmodel:\n  a: {c: 1}\ntrainer:\n  max_num_epochs: 3\nx: ${model.a}\n"
    overrides = ["optimizer.eps=1", "model.a.b.1=3", "new.deep.key=1", "trainer={max_num_epochs: 4}"]
    expected = {
        "optimizer.name": "base.yaml:2:3",
        "optimizer.lr": "c.yaml:3:3",
        "optimizer": "c.yaml:2:1",
        "optimizer.eps": "argument 'optimizer.eps=1'",
        "model.a.b.0": "base.yaml:4:17",
        "model.a.b.1": "argument 'model.a.b.1=3'",
        "model.a.c": "c.yaml:5:7",
        "x": "c.yaml:8:1",
        "x.c": "c.yaml:8:1",  # what has no place has that of the key above it
        "new": "argument 'new.deep.key=1'",
        "new.deep.key": "argument 'new.deep.key=1'",
        "trainer.max_epochs": "argument 'trainer={max_num_epochs: 4}'",
        "nothing": "c.yaml:1:1",
    }
    assert {key: place(text, key, overrides) for key in expected} == expected


def test_a_renamed_key_keeps_its_place() -> None:
    text = "loaders:\n  valid:\n    dataset: D\nmlflow_path: x\n"
    assert place(text, "loaders.val") == "c.yaml:2:3"
    assert place(text, "loaders.val.name") == "c.yaml:3:5"
    assert place(text, "mlflow.tracking_uri") == "c.yaml:4:1"
    assert place(text, "mlflow") == "c.yaml:4:1"


def test_what_was_replaced_leaves_no_place_behind() -> None:
    write("a:\n  b:\n    c: [1]\n", "base.yaml")
    assert place("_base_: base.yaml\na: {b: 1}\n", "a.b.c") == "c.yaml:2:5"
    assert place("_base_: base.yaml\na: {_delete_: true, d: 1}\n", "a.b") == "c.yaml:2:1"


# ---------------------------------------------------------------------------------------------------- made in Python


def test_a_mapping_made_in_python_becomes_a_config() -> None:
    np = pytest.importorskip("numpy")
    given_values = {
        "trainer": {"max_num_epochs": np.int64(3), "checkpoint_dir": Path("runs")},
        "optimizer": ConfigDict({"lr": np.float64(0.5), "betas": (1, 2)}),
        "seed": 1,
        "model": {"a": "${seed}", "b": [{"c": True}]},
    }
    config = from_mapping(given_values)
    assert to_plain(config) == {
        "trainer": {"checkpoint_dir": "runs", "max_epochs": 3},
        "optimizer": {"lr": 0.5, "betas": [1, 2]},
        "seed": 1,
        "model": {"a": 1, "b": [{"c": True}]},
        "experiment": "default",
    }
    assert config.model.b[0].is_locked
    assert given_values["trainer"]["max_num_epochs"] == 3, "the caller's own mapping is left alone"
    assert place_of(config, ("seed",)) is None


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ("c.yaml", "expected a mapping, found string 'c.yaml'; dtrain.load_config reads a file"),
        (None, "expected a mapping, found null; dtrain.load_config reads a file"),
        ({"model": {"act": len}}, "model.act: a config holds plain values, lists and mappings only, found a builtins.builtin_function_or_method"),
        ({"a": [{1, 2}]}, "a.0: a config holds plain values, lists and mappings only, found a builtins.set"),
        ({1: 2}, "a key must be a string, found int 1"),
        ({"a": {"b.c": 1}}, "a: the key 'b.c' contains a dot; nest the keys instead (dots are for the command line)"),
        ({"seed": 1, "manual_seed": 1}, "'manual_seed' and 'seed' are two names for one setting; keep one of them"),
        ({"a": "${b.c}"}, "a: '${b.c}': there is no such key"),
    ],
)  # fmt: skip
def test_what_is_no_config_is_refused(values: Any, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_mapping(values)
    assert str(caught.value) == expected


def test_a_mapping_that_holds_itself_is_refused() -> None:
    circle: dict[str, Any] = {}
    circle["a"] = circle
    with pytest.raises(ConfigError, match="nesting deeper than 50"):
        from_mapping(circle)


def test_copies_share_no_list() -> None:
    config = load_config(write("a: {b: [1, {c: [2]}]}\n"))
    copy = to_config_dict(config)
    copy.a.b[1].c.append(3)
    copy.a.new = 1
    plain = to_plain(config)
    plain["a"]["b"].append(4)
    assert to_plain(config)["a"] == {"b": [1, {"c": [2]}]}


# ------------------------------------------------------------------------------------------------------- there and back

KEYS = st.text(st.sampled_from("abcxyz_ -é"), min_size=1, max_size=6).filter(lambda key: not key.startswith("_"))
LEAVES = (
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=20)
    | st.sampled_from(["${HOME}", "$${x}", "a ${b.c} d", "1e-3", "on", "null", "010", "", "${", "$", "{}", "a: b"])
)  # fmt: skip
TREES = st.dictionaries(
    KEYS,
    st.recursive(LEAVES, lambda one: st.lists(one, max_size=3) | st.dictionaries(KEYS, one, max_size=3)),
    max_size=5,
)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    both_nan = isinstance(one, float) and isinstance(other, float) and math.isnan(one) and math.isnan(other)
    return type(one) is type(other) and (one == other or both_nan)


@given(TREES)
@settings(max_examples=100, deadline=None)
def test_a_config_written_as_yaml_is_read_back_the_same(tmp_path_factory: pytest.TempPathFactory, values: dict) -> None:
    file = tmp_path_factory.getbasetemp() / "there-and-back.yaml"
    values = {"experiment": "e"} | values
    file.write_text(to_yaml(values), encoding="utf-8", newline="")
    first = load_config(file)
    assert same(to_plain(first), values)
    file.write_text(to_yaml(first), encoding="utf-8", newline="")
    assert same(to_plain(load_config(file)), values)
    assert same(yaml.safe_load(to_yaml(first)), yaml.safe_load(to_yaml(values)))
