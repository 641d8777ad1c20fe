"""Every mistake of a config is told before anything is imported: in one line, with its place, and all of them at once."""

# ruff: noqa: E501 - a case of a table is one line, so that message and cause stand together

import ast
import copy
import itertools
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dtrain.config.annotations import correction, wanted_as, wrong_type
from dtrain.config.check import check, notes
from dtrain.config.errors import ConfigError, to_plain
from dtrain.config.load import from_mapping, load_config
from dtrain.config.rules import TOP_LEVEL
from dtrain.config.schema import OWN_SETTINGS, SLOTS, Slot, calls
from dtrain.config.signatures import SOURCE, Callee, module_file
from dtrain.config.yaml12 import dump, parse

PARTS = """\
from os import system
from typing import Callable, Literal
import subprocess as sp

class Maze:
    def __init__(
        self, dim: int, depth: int = 2, act: str = "relu", drop: float = 0.0, bias: bool = True,
        sizes: list[int] | None = None, mode: Literal["a", "b"] = "a",
    ): ...

class Shelf:
    def __init__(self, root: str, split: str = "train", transform: Callable | None = None): ...

class Wobble:
    def __init__(self, p: float = 0.5): ...

class Swallows:
    def __init__(self, dim: int = 1, **kwargs): ...

class Old:
    def __init__(self, config): ...

class Opened:
    def __init__(self, **kwargs): self.kwargs = kwargs

def soft(output, target, power: int = 1): ...

soft.higher_is_better = False

def factory(classes: int): ...

def decorated(function):
    return function

@decorated
def wrapped(a, b): ...

run = sp.run
"""

GOOD = """\
modules: [parts]
model: {name: Maze, dim: 8}
loaders:
  name: Shelf
  root: here
  batch_size: 4
  train: {split: train}
  val: {split: val}
loss: {name: CrossEntropyLoss}
metrics: {name: [Accuracy, Precision], task: multiclass, num_classes: 10}
optimizer: {name: AdamW, lr: 1e-3}
lr_scheduler: {name: StepLR, step_size: 3}
trainer: {max_epochs: 2}
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project: a module of its own, and one that is no Python."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "parts.py").write_text(PARTS)
    (folder / "broken.py").write_text("class X(:\n")
    return folder


@pytest.fixture(autouse=True)
def project(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test works in that folder, as `python -m dtrain` does."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    for name in ("parts", "broken", "twice", "made", "lazy", "loud"):
        monkeypatch.delitem(SOURCE._modules, name, raising=False)
    return folder


def told(text: str, *overrides: str) -> list[str]:
    """The messages for a config of this text; none if it is good."""
    Path("c.yaml").write_text(text, encoding="utf-8")
    try:
        check(load_config("c.yaml", overrides))
    except ConfigError as error:
        return str(error).split("\n")
    return []


def test_a_good_config_is_good() -> None:
    assert told(GOOD) == []


# ------------------------------------------------------------------------------------------------------------- golden

# A part of GOOD, what is written in its stead ("+": a line is added), and the lines that this gives. In angle brackets:
# what is long and belongs to a library's version, see `filled_in`.
MISTAKES: list[tuple[str, ...]] = [
    (
        "name: Maze",
        "name: Mazee",
        "c.yaml:2:9: model.name: there is no 'Mazee'; did you mean 'Maze'?; <searched model>",
    ),
    ("name: Maze", "name: maze", "c.yaml:2:9: model.name: there is no 'maze'; did you mean 'Maze'?; <searched model>"),
    (
        "name: Maze",
        "name: Conv2D",
        "c.yaml:2:9: model.name: there is no 'Conv2D'; did you mean 'Conv2d'?; <searched model>",
    ),
    (
        "name: Maze",
        "name: AdamW",
        "c.yaml:2:9: model.name: there is no 'AdamW'; did you mean torch.optim.AdamW?; <searched model>",
    ),
    ("name: Maze", "name: 3", "c.yaml:2:9: model.name: expected the name of a class or a function, found int 3"),
    ("name: Maze", "name: null", "c.yaml:2:9: model.name: expected the name of a class or a function, found null"),
    ("name: Maze", "name: ''", "c.yaml:2:9: model.name: expected the name of a class or a function, found string ''"),
    (
        "name: Maze",
        "name: [Maze]",
        "c.yaml:2:9: model.name: expected the name of a class or a function, found list ['Maze']",
    ),
    (
        "name: Maze",
        "name: {a: 1}",
        "c.yaml:2:9: model.name: expected the name of a class or a function, found mapping {'a': 1}",
    ),
    (
        "name: Maze",
        "nmae: Maze",
        "c.yaml:2:1: model: has no 'name', so nothing says what to build (found: nmae, dim); was 'name' meant by 'nmae'?",
    ),
    (
        "{name: Maze, dim: 8}",
        "{dim: 8}",
        "c.yaml:2:1: model: has no 'name', so nothing says what to build (found: dim)",
    ),
    ("{name: Maze, dim: 8}", "{}", "c.yaml:2:1: model: has no 'name', so nothing says what to build (found: nothing)"),
    ("{name: Maze, dim: 8}", "null", "c.yaml:2:1: model: missing, such as model: {name: ViT, ...}"),
    ("{name: Maze, dim: 8}", "Maze", "c.yaml:2:1: model: expected a mapping, found string 'Maze'"),
    ("{name: Maze, dim: 8}", "[Maze]", "c.yaml:2:1: model: expected a mapping, found list ['Maze']"),
    ("{name: Maze, dim: 8}", "3", "c.yaml:2:1: model: expected a mapping, found int 3"),
    ("model: {name: Maze, dim: 8}\n", "", "c.yaml:1:1: model: missing, such as model: {name: ViT, ...}"),
    (
        "dim: 8",
        "dmi: 8",
        "c.yaml:2:1: model: Maze is missing required argument 'dim'; <Maze>",
        "c.yaml:2:21: model.dmi: Maze got an unexpected argument 'dmi'; did you mean 'dim'?; <Maze>",
    ),
    (
        "dim: 8",
        "dim: 8, dpeth: 3",
        "c.yaml:2:29: model.dpeth: Maze got an unexpected argument 'dpeth'; did you mean 'depth'?; <Maze>",
    ),
    ("dim: 8", "dim: '8'", "c.yaml:2:21: model.dim: expected int, found string '8'; write 8 without quotes; <Maze>"),
    ("dim: 8", "dim: 8.5", "c.yaml:2:21: model.dim: expected int, found float 8.5; <Maze>"),
    ("dim: 8", "dim: 1e3", "c.yaml:2:21: model.dim: expected int, found float 1000.0; write 1000; <Maze>"),
    ("dim: 8", "dim: true", "c.yaml:2:21: model.dim: expected int, found bool true; <Maze>"),
    ("dim: 8", "dim: null", "c.yaml:2:21: model.dim: expected int, found null; <Maze>"),
    ("dim: 8", "dim: [8]", "c.yaml:2:21: model.dim: expected int, found list [8]; <Maze>"),
    ("dim: 8", "dim: {a: 1}", "c.yaml:2:21: model.dim: expected int, found mapping {'a': 1}; <Maze>"),
    ("dim: 8", "dim: 8, act: 3", "c.yaml:2:29: model.act: expected string, found int 3; <Maze>"),
    ("dim: 8", "dim: 8, act: null", "c.yaml:2:29: model.act: expected string, found null; <Maze>"),
    ("dim: 8", "dim: 8, drop: high", "c.yaml:2:29: model.drop: expected float, found string 'high'; <Maze>"),
    (
        "dim: 8",
        "dim: 8, drop: '0.5'",
        "c.yaml:2:29: model.drop: expected float, found string '0.5'; write 0.5 without quotes; <Maze>",
    ),
    ("dim: 8", "dim: 8, bias: yes", "c.yaml:2:29: model.bias: expected bool, found string 'yes'; write true; <Maze>"),
    ("dim: 8", "dim: 8, bias: 1", "c.yaml:2:29: model.bias: expected bool, found int 1; <Maze>"),
    (
        "dim: 8",
        "dim: 8, sizes: [1, a]",
        "c.yaml:2:29: model.sizes: expected list[int] or null, found list [1, 'a']; <Maze>",
    ),
    (
        "dim: 8",
        "dim: 8, sizes: None",
        "c.yaml:2:29: model.sizes: expected list[int] or null, found string 'None'; write null; <Maze>",
    ),
    ("dim: 8", "dim: 8, sizes: 3", "c.yaml:2:29: model.sizes: expected list[int] or null, found int 3; <Maze>"),
    ("dim: 8", "dim: 8, mode: c", "c.yaml:2:29: model.mode: expected one of 'a', 'b', found string 'c'; <Maze>"),
    ("dim: 8", "dim: 1e999", "c.yaml:2:21: model.dim: expected int, found string '1e999'; <Maze>"),
    (
        "{name: Maze, dim: 8}",
        "{name: Swallows, dim: 8, other: 1}",
        "c.yaml:2:33: model.other: Swallows got an unexpected argument 'other'; Swallows(dim: int = 1)",
    ),
    (
        "{name: Maze, dim: 8}",
        "{name: Old, items: 1, a: {get: 2}}",
        "c.yaml:2:20: model.items: is the name of a ConfigDict method, so a class that reads its config by attribute cannot see it; rename it",
        "c.yaml:2:34: model.a.get: is the name of a ConfigDict method, so a class that reads its config by attribute cannot see it; rename it",
    ),
    (
        "{name: Maze, dim: 8}",
        "{name: parts.Maze}",
        "c.yaml:2:1: model: Maze is missing required argument 'dim'; <Maze>",
    ),
    (
        "{name: Maze, dim: 8}",
        "{name: parts:Mazee, dim: 8}",
        "c.yaml:2:9: model.name: 'parts' has no 'Mazee'; did you mean 'Maze'?",
    ),
    (
        "{name: Maze, dim: 8}",
        "{name: prats.Maze, dim: 8}",
        "c.yaml:2:9: model.name: there is no package 'prats'; did you mean 'parts'?",
    ),
    (
        "{name: Maze, dim: 8}",
        "{name: parts, dim: 8}",
        "c.yaml:2:9: model.name: there is no 'parts'; did you mean 'pair'?; <searched model>",
    ),
    (
        "{name: Maze, dim: 8}",
        "{name: torch.nn, dim: 8}",
        "c.yaml:2:9: model.name: 'torch.nn' is a module; expected a class or a function in it",
    ),
    (
        "{name: Maze, dim: 8}",
        "{name: torch.nn.Lienar, dim: 8}",
        "c.yaml:2:9: model.name: 'torch.nn' has no 'Lienar'; did you mean 'Linear'?",
    ),
    (
        "{name: Maze, dim: 8}",
        "{name: torch.nn.Linear, in_features: 8}",
        "c.yaml:2:1: model: Linear is missing required argument 'out_features'; <Linear>",
    ),
    ("{name: Maze, dim: 8}", "{name: other.Maze, dim: 8}", "c.yaml:2:9: model.name: there is no package 'other'"),
    (
        "{name: Maze, dim: 8}",
        "{name: os.system, command: ls}",
        "c.yaml:2:9: model.name: 'os.system' is from the standard library, which a config may not name",
    ),
    (
        "{name: Maze, dim: 8}",
        "{name: torch.os.system, command: ls}",
        "c.yaml:2:9: model.name: 'torch.os.system' leads to 'os' from the standard library, which a config may not name",
    ),
    (
        "{name: Maze, dim: 8}",
        "{name: system, command: ls}",
        "c.yaml:2:9: model.name: 'system' of parts is 'os.system' from the standard library, which a config may not name",
    ),
    (
        "{name: Maze, dim: 8}",
        "{name: parts.run, args: ls}",
        "c.yaml:2:9: model.name: 'parts.run' leads to 'subprocess.run' from the standard library, which a config may not name",
    ),
    (
        "{name: Maze, dim: 8}",
        "{name: parts.Maze.__init__}",
        "c.yaml:2:9: model.name: 'parts.Maze.__init__' is not a valid name of a class or a function",
    ),
    (
        "{name: Maze, dim: 8}",
        "{name: ../parts.Maze}",
        "c.yaml:2:9: model.name: '../parts.Maze' is not a valid name of a class or a function",
    ),
    (
        "{name: Maze, dim: 8}",
        "{name: Maze(8)}",
        "c.yaml:2:9: model.name: 'Maze(8)' is not a valid name of a class or a function",
    ),
    (
        "modules: [parts]",
        "modules: [part]",
        "c.yaml:1:11: modules.0: there is no module 'part' here or installed; did you mean 'parts'?; one that may be missing is listed under optional_modules",
    ),
    (
        "modules: [parts]",
        "modules: [parts, broken]",
        "c.yaml:1:18: modules.1: SyntaxError: invalid syntax (<folder>/broken.py:1)",
    ),
    (
        "modules: [parts]",
        "modules: [parts.py]",
        "c.yaml:1:11: modules.0: 'parts.py' is a path; a module is named as in Python, such as parts",
    ),
    (
        "modules: [parts]",
        "modules: [os]",
        "c.yaml:1:11: modules.0: 'os' is from the standard library, which a config may not name",
    ),
    ("modules: [parts]", "modules: [parts, 3]", "c.yaml:1:18: modules.1: expected the name of a module, found int 3"),
    (
        "modules: [parts]",
        "modules: {parts: 1}",
        "c.yaml:1:1: modules: expected the name of a module, found mapping {'parts': 1}",
    ),
    (
        "name: Shelf",
        "name: Shelv",
        "c.yaml:4:3: loaders.name: there is no 'Shelv'; did you mean 'Shelf'?; <searched loaders>",
    ),
    (
        "name: Shelf",
        "dataset_name: Shelf",
        "c.yaml:3:1: loaders: has no 'name', so nothing says what to build (found: dataset_name, root, batch_size, train, val)",
    ),
    (
        "  batch_size: 4",
        "  batchsize: 4",
        "c.yaml:6:3: loaders.batchsize: Shelf got an unexpected argument 'batchsize'; did you mean 'batch_size'?; <Shelf>",
    ),
    ("  batch_size: 4", "  batch_size: 0", "c.yaml:6:3: loaders.batch_size: must be at least 1, found 0"),
    (
        "  batch_size: 4",
        "  batch_size: 4.0",
        "c.yaml:6:3: loaders.batch_size: expected int or null, found float 4.0; write 4",
    ),
    (
        "  batch_size: 4",
        "  batch_size: four",
        "c.yaml:6:3: loaders.batch_size: expected int or null, found string 'four'",
    ),
    (
        "  batch_size: 4",
        "  batch_size: 4\n  global_batch_size: 8",
        "c.yaml:7:3: loaders.global_batch_size: cannot be combined with 'batch_size'; keep one of them, or set the other to null",
    ),
    (
        "max_epochs: 2",
        "max_epochs: 2, ema_decay: 1.5",
        "c.yaml:13:26: trainer.ema_decay: must be from 0 to 1, found 1.5",
    ),
    ("  batch_size: 4", "  num_workers: -1", "c.yaml:6:3: loaders.num_workers: must be at least 0, found -1"),
    (
        "  batch_size: 4",
        "  transform: flip",
        "c.yaml:6:3: loaders.transform: there is no 'flip'; did you mean 'Flip'?; <searched loaders> and the other sections' libraries",
    ),
    (
        "  batch_size: 4",
        "  transform: {name: Wobbel}",
        "c.yaml:6:15: loaders.transform.name: there is no 'Wobbel'; did you mean 'Wobble'?; <searched loaders> and the other sections' libraries",
    ),
    (
        "  batch_size: 4",
        "  transform: {name: Wobble, q: 1}",
        "c.yaml:6:29: loaders.transform.q: Wobble got an unexpected argument 'q'; Wobble(p: float = 0.5)",
    ),
    (
        "  batch_size: 4",
        "  transform: {name: Wobble, p: a}",
        "c.yaml:6:29: loaders.transform.p: expected float, found string 'a'; Wobble(p: float = 0.5)",
    ),
    (
        "  batch_size: 4",
        "  transform: [{name: Wobble}, {name: Wobble, p: []}]",
        "c.yaml:6:46: loaders.transform.1.p: expected float, found list []; Wobble(p: float = 0.5)",
    ),
    (
        "  batch_size: 4",
        "  collate_fn: padded_up",
        "c.yaml:6:3: loaders.collate_fn: there is no 'padded_up'; did you mean 'Padd'?; searched parts and the other sections' libraries",
    ),
    (
        "{split: train}",
        "{splitt: train}",
        "c.yaml:7:11: loaders.train.splitt: Shelf got an unexpected argument 'splitt'; did you mean 'split'?; <Shelf>",
    ),
    (
        "{split: train}",
        "{split: train, batch_size: many}",
        "c.yaml:7:25: loaders.train.batch_size: expected int or null, found string 'many'",
    ),
    ("{split: train}", "null", "c.yaml:3:1: loaders: has no 'train', so there is nothing to train on"),
    ("{split: train}", "train", "c.yaml:7:3: loaders.train: expected a mapping, found string 'train'"),
    ("{split: train}", "{name: Qqqqq}", "c.yaml:7:11: loaders.train.name: there is no 'Qqqqq'; <searched loaders>"),
    ("  train: {split: train}\n", "", "c.yaml:3:1: loaders: has no 'train', so there is nothing to train on"),
    (
        "name: CrossEntropyLoss",
        "name: HuberLos",
        "c.yaml:9:8: loss.name: there is no 'HuberLos'; did you mean 'HuberLoss' or 'huber_loss'?; <searched loss>",
    ),
    (
        "name: CrossEntropyLoss",
        "name: CrossEntropyLoss, weights: [1, 2]",
        "c.yaml:9:32: loss.weights: CrossEntropyLoss got an unexpected argument 'weights'; did you mean 'weight'?; <CrossEntropyLoss>",
    ),
    (
        "name: CrossEntropyLoss",
        "name: CrossEntropyLoss, weight: heavy",
        "c.yaml:9:32: loss.weight: expected a list of numbers or null, found string 'heavy'; <CrossEntropyLoss>",
    ),
    (
        "name: CrossEntropyLoss",
        "name: CrossEntropyLoss, reduction: 3",
        "c.yaml:9:32: loss.reduction: expected string, found int 3; <CrossEntropyLoss>",
    ),
    (
        "name: CrossEntropyLoss",
        "name: soft, target: 3",
        "c.yaml:9:1: loss: soft is missing required argument 'output'; soft(output, target, power: int = 1)",
    ),
    (
        "name: CrossEntropyLoss",
        "name: soft, powr: 3",
        "c.yaml:9:20: loss.powr: soft got an unexpected argument 'powr'; did you mean 'power'?; soft(output, target, power: int = 1)",
    ),
    (
        "name: CrossEntropyLoss",
        "name: factory",
        "c.yaml:9:1: loss: factory is missing required argument 'classes'; factory(classes: int)",
    ),
    (
        "task: multiclass",
        "tsak: multiclass",  # the task is then that of the loss
        "c.yaml:10:40: metrics.tsak: unexpected argument 'tsak', which no metric takes; did you mean 'task'?; <Accuracy>; <Precision>",
    ),
    (
        "task: multiclass",
        "task: multiclas",
        "c.yaml:10:40: metrics.task: expected one of 'binary', 'multiclass', 'multilabel', found string 'multiclas'; <Accuracy>",
    ),
    (
        "[Accuracy, Precision]",
        "[Accuracy, Precison]",
        "c.yaml:10:28: metrics.name.1: there is no 'Precison'; did you mean 'Precision'?; <searched metrics>",
    ),
    (
        "[Accuracy, Precision]",
        "[Accuracy, Accuracy]",
        "c.yaml:10:28: metrics.name.1: a second 'Accuracy'; to tell them apart, label them: metrics: {first: {name: ...}, second: ...}",
    ),
    ("[Accuracy, Precision]", "[]", "c.yaml:10:11: metrics.name: the list is empty; remove 'metrics', or name some"),
    (
        "[Accuracy, Precision]",
        "3",
        "c.yaml:10:11: metrics.name: expected the name of a class or a function, found int 3",
    ),
    (
        "num_classes: 10",
        "num_classes: ten",
        "c.yaml:10:58: metrics.num_classes: expected int or null, found string 'ten'; <Accuracy>",
    ),
    (
        "num_classes: 10",
        "num_classes: 10, Precision: 3",
        "c.yaml:10:75: metrics.Precision: expected a mapping, found int 3",
    ),
    (
        "num_classes: 10",
        "num_classes: 10, Precision: {averag: macro}",
        "c.yaml:10:87: metrics.Precision.averag: Precision got an unexpected argument 'averag'; did you mean 'average'?; <Precision>",
    ),
    (
        "num_classes: 10",
        "num_classes: 10, Precision: {average: makro}",
        "c.yaml:10:87: metrics.Precision.average: expected one of 'micro', 'macro', 'weighted', 'none' or null, found string 'makro'; <Precision>",
    ),
    (
        "{name: [Accuracy, Precision], task: multiclass, num_classes: 10}",
        "[{name: Accuracy}, {nam: Precision}, 3]",
        "c.yaml:10:11: metrics.0: Accuracy is missing required argument 'task'; <Accuracy>",
        "c.yaml:10:29: metrics.1: has no 'name', so nothing says what to build (found: nam); was 'name' meant by 'nam'?",
        "c.yaml:10:47: metrics.2: expected a mapping, found int 3",
    ),
    (
        "{name: [Accuracy, Precision], task: multiclass, num_classes: 10}",
        "{nmae: [Accuracy], task: multiclass}",
        "c.yaml:10:1: metrics: has no 'name', so nothing says what to build (found: nmae, task); was 'name' meant by 'nmae'?",
    ),
    (
        "{name: [Accuracy, Precision], task: multiclass, num_classes: 10}",
        "{a: {name: Accuracy}, b: 3}",
        "c.yaml:10:11: metrics.a: Accuracy is missing required argument 'task'; <Accuracy>",
        "c.yaml:10:32: metrics.b: expected a mapping, found int 3",
    ),
    (
        "{name: [Accuracy, Precision], task: multiclass, num_classes: 10}",
        "Accuracy",
        "c.yaml:10:1: metrics: expected a mapping, found string 'Accuracy'",
    ),
    ("lr: 1e-3", "lr: fast", "c.yaml:11:26: optimizer.lr: expected float, found string 'fast'; <AdamW>"),
    (
        "lr: 1e-3",
        "lrr: 1e-3",
        "c.yaml:11:26: optimizer.lrr: AdamW got an unexpected argument 'lrr'; did you mean 'lr'?; <AdamW>",
    ),
    (
        "lr: 1e-3",
        "lr: '1e-3'",
        "c.yaml:11:26: optimizer.lr: expected float, found string '1e-3'; write 0.001 without quotes; <AdamW>",
    ),
    (
        "lr: 1e-3",
        "lr: 1e-3, betas: [0.9]",
        "c.yaml:11:36: optimizer.betas: expected tuple[float | Tensor, float | Tensor], found list [0.9]; <AdamW>",
    ),
    (
        "lr: 1e-3",
        "lr: 1e-3, betas: 0.9",
        "c.yaml:11:36: optimizer.betas: expected tuple[float | Tensor, float | Tensor], found float 0.9; <AdamW>",
    ),
    ("lr: 1e-3", "lr: 1e-3, params: []", "c.yaml:11:36: optimizer.params: 'params' is supplied by dtrain; remove it"),
    (
        "lr: 1e-3",
        "lr: 1e-3, amsgrad: on",
        "c.yaml:11:36: optimizer.amsgrad: expected bool, found string 'on'; write true; <AdamW>",
    ),
    (
        "name: AdamW",
        "name: Adamw",
        "c.yaml:11:13: optimizer.name: there is no 'Adamw'; did you mean 'AdamW'?; <searched optimizer>",
    ),
    (
        "optimizer:",
        "optimiser:",
        "c.yaml:1:1: optimizer: missing, such as optimizer: {name: AdamW, lr: 1e-3}",
        "c.yaml:11:1: optimiser: unknown section; did you mean 'optimizer'?; possible: <sections>",
    ),
    (
        "optimizer: {name: AdamW, lr: 1e-3}",
        "optimizer: AdamW",
        "c.yaml:11:1: optimizer: expected a mapping, found string 'AdamW'",
    ),
    (
        "name: StepLR",
        "name: SteppLR",
        "c.yaml:12:16: lr_scheduler.name: there is no 'SteppLR'; did you mean 'StepLR'?; <searched lr_scheduler>",
    ),
    (
        "step_size: 3",
        "stepsize: 3",
        "c.yaml:12:1: lr_scheduler: StepLR is missing required argument 'step_size'; <StepLR>",
        "c.yaml:12:30: lr_scheduler.stepsize: StepLR got an unexpected argument 'stepsize'; did you mean 'step_size'?; <StepLR>",
    ),
    (
        "step_size: 3",
        "step_size: 3, interval: batch",
        "c.yaml:12:44: lr_scheduler.interval: expected one of 'epoch', 'step', 'validation' or null, found string 'batch'",
    ),
    (
        "step_size: 3",
        "step_size: 3, warmup_steps: -1",
        "c.yaml:12:44: lr_scheduler.warmup_steps: must be at least 0, found -1",
    ),
    (
        "step_size: 3",
        "step_size: 3, optimizer: x",
        "c.yaml:12:44: lr_scheduler.optimizer: 'optimizer' is supplied by dtrain; remove it",
    ),
    ("trainer: {max_epochs: 2}\n", "", "c.yaml:1:1: trainer: needs max_epochs or max_steps, such as max_epochs: 10"),
    (
        "max_epochs: 2",
        "max_epoch: 2",
        "c.yaml:13:1: trainer: needs max_epochs or max_steps, such as max_epochs: 10",
        "c.yaml:13:11: trainer.max_epoch: trainer got an unexpected argument 'max_epoch'; did you mean 'max_epochs'?; <trainer>",
    ),
    ("max_epochs: 2", "max_epochs: ten", "c.yaml:13:11: trainer.max_epochs: expected int or null, found string 'ten'"),
    ("max_epochs: 2", "max_epochs: -1", "c.yaml:13:11: trainer.max_epochs: must be at least 0, found -1"),
    ("max_epochs: 2", "max_epochs: .nan", "c.yaml:13:11: trainer.max_epochs: expected int or null, found float nan"),
    (
        "max_epochs: 2",
        "max_epochs: null",
        "c.yaml:13:1: trainer: needs max_epochs or max_steps, such as max_epochs: 10",
    ),
    (
        "max_epochs: 2",
        "max_epochs: 2, precision: fp8",
        "c.yaml:13:26: trainer.precision: expected one of 'fp32', 'bf16', 'fp16' or null, found string 'fp8'",
    ),
    (
        "max_epochs: 2",
        "max_epochs: 2, mode: best",
        "c.yaml:13:26: trainer.mode: expected one of 'min', 'max' or null, found string 'best'",
    ),
    ("max_epochs: 2", "max_epochs: 2, accumulate: 0", "c.yaml:13:26: trainer.accumulate: must be at least 1, found 0"),
    (
        "max_epochs: 2",
        "max_epochs: 2, monitor: val/accuracy",
        "c.yaml:13:26: trainer.monitor: 'val/accuracy' is not a metric of the validation; did you mean 'val/Accuracy'?; possible: val/Accuracy, val/Precision, val/loss",
    ),
    (
        "max_epochs: 2",
        "max_epochs: 2, parts: 3",
        "c.yaml:13:26: trainer.parts: 'parts' is supplied by dtrain; remove it",
    ),
    (
        "max_epochs: 2",
        "max_epochs: 2, name: Trainr",
        "c.yaml:13:26: trainer.name: there is no 'Trainr'; did you mean 'Trainer'?; searched parts, dtrain.trainer",
    ),
    (
        "max_epochs: 2",
        "max_epochs: 2, ddp: {find_unused: true}",
        "c.yaml:13:32: trainer.ddp.find_unused: trainer.ddp got an unexpected argument 'find_unused'; did you mean 'find_unused_parameters'?; <ddp>",
    ),
    ("max_epochs: 2", "max_epochs: 2, ddp: 3", "c.yaml:13:26: trainer.ddp: expected a mapping or null, found int 3"),
    ("{max_epochs: 2}", "10", "c.yaml:13:1: trainer: expected a mapping, found int 10"),
    (
        "+",
        "device: gpu",
        "c.yaml:14:1: device: 'gpu' is not a device; possible: auto, cpu, cuda, cuda:N, mps, or a list of them",
    ),
    (
        "+",
        "device: cuda:x",
        "c.yaml:14:1: device: 'cuda:x' is not a device; possible: auto, cpu, cuda, cuda:N, mps, or a list of them",
    ),
    ("+", "device: 0", "c.yaml:14:1: device: expected string or a list of strings, found int 0"),
    ("+", "seed: a", "c.yaml:14:1: seed: expected int or null, found string 'a'"),
    ("+", "seed: -1", "c.yaml:14:1: seed: must be at least 0, found -1"),
    ("+", "seed: 1.5", "c.yaml:14:1: seed: expected int or null, found float 1.5"),
    (
        "trainer: {max_epochs: 2}",
        "trainer: {time_limit: soon, max_epochs: 2}",
        "c.yaml:13:11: trainer.time_limit: expected a time above 0: seconds, 90m, 1.5h, 2d, 01:30:00 or 1-12:00:00; found string 'soon'",
    ),
    ("+", "experiment: 3", "c.yaml:14:1: experiment: expected string or null, found int 3"),
    ("+", "run_name: [a]", "c.yaml:14:1: run_name: expected string or null, found list ['a']"),
    ("+", "mlflow: {uri: x}", "c.yaml:14:10: mlflow.uri: mlflow got an unexpected argument 'uri'; <mlflow>"),
    (
        "+",
        "mlflow: {tracking_uri: file:///tmp/x}",
        "c.yaml:14:10: mlflow.tracking_uri: MLflow 3 no longer writes to 'file:///tmp/x'; name the folder alone (sqlite is put in it), or a server",
    ),
    (
        "+",
        "mlflow: {exit_timeout_seconds: -1}",
        "c.yaml:14:10: mlflow.exit_timeout_seconds: must be at least 0, found -1",
    ),
    ("+", "mlflow: {folder: x}", "c.yaml:14:10: mlflow.folder: 'folder' is supplied by dtrain; remove it"),
    ("+", "mlflow: x", "c.yaml:14:1: mlflow: expected a mapping, found string 'x'"),
    ("+", "learning_rate: 3", "c.yaml:14:1: learning_rate: unknown section; possible: <sections>"),
    (
        "+",
        "lr_schedular: {name: StepLR}",
        "c.yaml:14:1: lr_schedular: unknown section; did you mean 'lr_scheduler'?; possible: <sections>",
    ),
    ("+", "Model: {name: Maze}", "c.yaml:14:1: Model: unknown section; did you mean 'model'?; possible: <sections>"),
    ("+", "_delete_: true", "c.yaml:14:1: _delete_: unknown section; possible: <sections>"),
    (
        "{name: Maze, dim: 8}",
        "{name: Maze, dim: 8, block: {name: Wobble}}",
        "c.yaml:2:29: model.block: Maze got an unexpected argument 'block'; <Maze>",
    ),
    (
        "{name: Maze, dim: 8}",
        "{name: Maze, dim: {name: Wobble, q: 1}}",
        "c.yaml:2:41: model.dim.q: Wobble got an unexpected argument 'q'; Wobble(p: float = 0.5)",
    ),
    (
        "{name: Maze, dim: 8}",
        "{name: Maze, dim: [{name: Wobble, q: 1}, {name: Wobblo}]}",
        "c.yaml:2:42: model.dim.0.q: Wobble got an unexpected argument 'q'; Wobble(p: float = 0.5)",
        "c.yaml:2:50: model.dim.1.name: there is no 'Wobblo'; did you mean 'Wobble'?; <searched model> and the other sections' libraries",
    ),
    (
        "{name: Maze, dim: 8}",
        "{name: Maze, dim: {deep: [{name: Wobble, q: 1}]}}",
        "c.yaml:2:21: model.dim: expected int, found mapping {'deep': [{'name': 'Wobble', 'q': 1}]}; <Maze>",
        "c.yaml:2:49: model.dim.deep.0.q: Wobble got an unexpected argument 'q'; Wobble(p: float = 0.5)",
    ),
    (
        "{name: Maze, dim: 8}",
        "{name: parts.Maze, dim: 8, }\nmodel: {}",
        "c.yaml:3:1: duplicate key 'model', first written on line 2",
    ),
    (
        "modules: [parts]",
        "modules: [parts]\nmodules: [parts]",
        "c.yaml:2:1: duplicate key 'modules', first written on line 1",
    ),
    ("lr: 1e-3", "lr: 1e-3, lr: 2e-3", "c.yaml:11:36: duplicate key 'optimizer.lr', first written on line 11"),
    (
        "lr: 1e-3",
        "lr: ${LEARNING_RATE_THAT_IS_NOT_SET}",
        "c.yaml:11:31: not valid YAML: expected ',' or '}', but got '{' (while parsing a flow mapping); inside {...} or [...] a reference needs quotes: '${...}'",
    ),
    (
        "lr: 1e-3",
        "lr: '${optimizer.l}'",
        "c.yaml:11:26: optimizer.lr: '${optimizer.l}': there is no such key; did you mean 'optimizer.lr' or 'optimizer'?",
    ),
    (
        "lr: 1e-3",
        "lr: !!python/name:os.system",
        "c.yaml:11:53: not valid YAML: expected ' ', but found '}' (while scanning a tag)",
    ),
    ("name: AdamW", "name: AdamW, 3: 4", "c.yaml:11:26: a key must be a string; put '3' in quotes"),
    (
        "  root: here",
        "  root: here\n\tsplit: x",
        "c.yaml:6:1: not valid YAML: found character '\\t' that cannot start any token (while scanning for the next token); indent with spaces",
    ),
    (
        "{max_epochs: 2}",
        "{max_epochs: 2",
        "c.yaml:14:1: not valid YAML: expected ',' or '}', but got '<stream end>' (while parsing a flow mapping begun on line 13)",
    ),
    (
        "max_epochs: 2",
        "max_epochs: 2, max_num_epochs: 3",
        "c.yaml:13:26: 'trainer.max_num_epochs' and 'trainer.max_epochs' are two names for one setting; keep one of them",
    ),
    (
        "  batch_size: 4",
        "  dataset: Shelf",
        "c.yaml:6:3: loaders.dataset: Shelf got an unexpected argument 'dataset'; 'dataset' and 'name' are two names for one setting, keep one of them; <Shelf>",
    ),
]


def filled_in(line: str, folder: Path) -> str:
    """A line with the signatures, the places that were searched, and the possible keys put in."""
    libraries = {"torch.optim": "AdamW", "torch.nn": "CrossEntropyLoss Linear", "torch.optim.lr_scheduler": "StepLR"}
    libraries |= {"torchmetrics": "Accuracy Precision", "parts": "Maze Shelf"}
    for library, names in libraries.items():
        for name in names.split():
            if f"<{name}>" in line:
                callee = SOURCE.lookup(library, name)
                assert isinstance(callee, Callee)
                line = line.replace(f"<{name}>", callee.signature)
    for section, slot in SLOTS.items():
        there = ["parts", *(library for library in slot.libraries if module_file(library))]
        line = line.replace(f"<searched {section}>", f"searched {', '.join(there)}")
    for group, name in OWN_SETTINGS.items():
        if f"<{group}>" in line:
            callee = SOURCE.lookup(*name.split(":"))
            assert isinstance(callee, Callee)
            slot = SLOTS.get(group, Slot())
            possible = [item.name for item in callee.parameters if item.name not in {slot.given, *slot.given_names}]
            line = line.replace(f"<{group}>", f"possible: {', '.join(possible)}")
    return line.replace("<sections>", ", ".join(TOP_LEVEL)).replace("<folder>", str(folder))


@pytest.mark.parametrize(("part", "instead", "lines"), [(case[0], case[1], case[2:]) for case in MISTAKES])
def test_a_mistake_is_told_in_one_line_with_its_place(
    part: str, instead: str, lines: tuple[str, ...], folder: Path
) -> None:
    assert part == "+" or part in GOOD
    text = f"{GOOD}{instead}\n" if part == "+" else GOOD.replace(part, instead)
    assert told(text) == [filled_in(line, folder) for line in lines]


def test_there_are_enough_of_them() -> None:
    assert len(MISTAKES) >= 60


def test_a_misspelt_everything_is_told_at_once() -> None:
    text = """\
modlues: [parts]
modules: [parts]
device: gpu
model: {name: Mazze, dim: 8}
loaders: {name: Shelf, roott: x, batch_size: none, train: {splitt: a}}
loss: {name: CrossEntropyLos}
metrics: {name: [Acuracy, F1Scor], task: multiclass}
optimizer: {name: AdamW, lrr: 1}
lr_scheduler: {name: StepLR, step_size: often}
trainer: {max_epoch: 1, precision: half}
mlflow: {tracking: x}
"""
    places = [line.split(":")[1:4] for line in told(text)]
    assert [(int(line), key.strip()) for line, _, key in places] == [
        (1, "modlues"),
        (3, "device"),
        (4, "model.name"),
        (5, "loaders.roott"),
        (5, "loaders.batch_size"),
        (5, "loaders.train"),  # needs 'root'
        (5, "loaders.train.splitt"),
        (6, "loss.name"),
        (7, "metrics.name.0"),
        (7, "metrics.name.1"),
        (8, "optimizer.lrr"),
        (9, "lr_scheduler.step_size"),
        (10, "trainer"),  # needs max_epochs
        (10, "trainer.max_epoch"),
        (10, "trainer.precision"),
        (11, "mlflow.tracking"),
    ]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "optimizer.lrr=1",
            "argument 'optimizer.lrr=1': optimizer.lrr: AdamW got an unexpected argument 'lrr'; did you mean 'lr'?; <AdamW>",
        ),
        (
            "trainer.max_num_epoch=1",
            "argument 'trainer.max_num_epoch=1': trainer.max_num_epoch: trainer got an unexpected argument 'max_num_epoch'; did you mean 'max_epochs'?; <trainer>",
        ),
        (
            "trainer.max_num_epochs=a",
            "argument 'trainer.max_num_epochs=a': trainer.max_epochs: expected int or null, found string 'a'",
        ),
        (
            "metrics.name.1=Recal",
            "argument 'metrics.name.1=Recal': metrics.name.1: there is no 'Recal'; did you mean 'Recall'?; <searched metrics>",
        ),
        (
            "_base_=other.yaml",
            "argument '_base_=other.yaml': _base_: stands in the file, which names what it extends; not on the command line",
        ),
        (
            "trainer.time_limit=0",
            "argument 'trainer.time_limit=0': trainer.time_limit: expected a time above 0: seconds, 90m, 1.5h, 2d, 01:30:00 or 1-12:00:00; found int 0",
        ),
        (
            "modle.dim=1",
            "argument 'modle.dim=1': modle: unknown section; did you mean 'modules' or 'model'?; possible: <sections>",
        ),
    ],
)
def test_a_mistake_in_an_override_names_the_argument(override: str, expected: str, folder: Path) -> None:
    assert told(GOOD, override) == [filled_in(expected, folder)]


def test_a_mistake_in_a_base_names_the_base() -> None:
    Path("base.yaml").write_text(GOOD.replace("lr: 1e-3", "lrr: 1e-3"))
    assert told("_base_: base.yaml\noptimizer: {eps: 1e-8}\n")[0].startswith("base.yaml:11:26: optimizer.lrr: ")


def test_a_mapping_made_in_python_is_told_without_places() -> None:
    with pytest.raises(ConfigError) as caught:
        check(from_mapping({"model": {"name": 3}}))
    lines = str(caught.value).split("\n")
    assert "model.name: expected the name of a class or a function, found int 3" in lines
    assert "loss: missing, such as loss: {name: CrossEntropyLoss}" in lines
    assert not any(line.startswith(("None", ":")) for line in lines)


def test_without_places_too_every_mistake_is_told() -> None:
    with pytest.raises(ConfigError) as caught:
        check(from_mapping({"seed": -1, "trainer": {"max_epochs": -1, "accumulate": "x"}}))
    keys = [line.partition(":")[0] for line in str(caught.value).split("\n")]
    assert keys == ["loaders", "loss", "model", "optimizer", "seed", "trainer.accumulate", "trainer.max_epochs"]


# --------------------------------------------------------------------------------------------------- what is accepted


@pytest.mark.parametrize(
    ("part", "instead"),
    [
        ("{name: Maze, dim: 8}", "{name: parts.Maze, dim: 8}"),
        ("{name: Maze, dim: 8}", "{name: 'parts:Maze', dim: 8}"),
        ("{name: Maze, dim: 8}", "{name: torch.nn.Linear, in_features: 8, out_features: 1}"),
        ("{name: Maze, dim: 8}", "{name: Opened, anything: {goes: here}}"),
        ("{name: Maze, dim: 8}", "{name: wrapped, a: 1, c: 3}"),  # what its decorator makes of it, only a run can tell
        ("{name: Maze, dim: 8}", "{name: Old, hidden_size: 3, name2: x}"),
        ("{name: Maze, dim: 8}", "{name: Old, config: {hidden_size: 3}}"),
        ("{name: Maze, dim: 8}", "{name: LSTM, input_size: 3, hidden_size: 4, num_layers: 2}"),
        ("dim: 8", "dim: {name: Wobble}"),  # once built, a component may be anything
        ("dim: 8", "dim: 8, sizes: [1, 2], mode: b, drop: 1, bias: false"),
        ("dim: 8", "dim: 8, sizes: null"),
        ("modules: [parts]", "modules: parts"),
        ("  batch_size: 4", "  transform: {name: Wobble, p: 1}"),
        ("  batch_size: 4", "  transform: {name: ToTensorLike}".replace("ToTensorLike", "soft, power: 2")),
        ("  batch_size: 4", "  collate_fn: {name: torch.utils.data.default_collate}"),
        ("  batch_size: 4", "  global_batch_size: 8\n  num_workers: 2\n  persistent_workers: false"),
        ("{split: train}", "{name: Shelf, root: there}"),
        ("{name: CrossEntropyLoss}", "{name: CrossEntropyLoss, weight: [1, 2.5], label_smoothing: 0}"),
        ("{name: CrossEntropyLoss}", "{name: soft, power: 2}"),
        ("{name: CrossEntropyLoss}", "{name: torch.nn.functional.cross_entropy}"),
        ("{name: CrossEntropyLoss}", "{name: l1_loss}"),
        ("{name: CrossEntropyLoss}", "{name: factory, classes: 3}"),
        ("num_classes: 10", "num_classes: 10, Precision: {average: macro}"),
        ("num_classes: 10", "num_classes: 10, Precision: null"),
        ("[Accuracy, Precision]", "[Accuracy]"),
        ("[Accuracy, Precision]", "Accuracy"),
        ("[Accuracy, Precision]", "[torchmetrics.Accuracy, 'torchmetrics.classification:Precision']"),
        ("{name: [Accuracy, Precision], task: multiclass, num_classes: 10}", "[{name: MeanSquaredError}, {name: MeanSquaredError, squared: false}]"),
        ("{name: [Accuracy, Precision], task: multiclass, num_classes: 10}", "{a: {name: MeanSquaredError}, b: {name: soft}}"),
        ("{name: [Accuracy, Precision], task: multiclass, num_classes: 10}", "{name: soft, power: 3}"),
        ("{name: [Accuracy, Precision], task: multiclass, num_classes: 10}", "null"),
        ("lr: 1e-3", "lr: 1"),
        ("lr: 1e-3", "lr: 1e-3, betas: [0.9, 0.99], fused: null"),
        ("{name: StepLR, step_size: 3}", "{name: CosineAnnealingLR}"),  # its T_max is filled in
        ("{name: StepLR, step_size: 3}", "{name: torch.optim.lr_scheduler.CosineAnnealingLR, interval: step, warmup_steps: 3}"),
        ("{name: StepLR, step_size: 3}", "{name: SequentialLR, milestones: [1], schedulers: [{name: LinearLR}, {name: StepLR, step_size: 1}]}"),
        ("{name: StepLR, step_size: 3}", "{name: ChainedScheduler, schedulers: [{name: LinearLR}, {name: StepLR, step_size: 1}]}"),
        ("max_epochs: 2", "max_steps: 2, monitor: val/Accuracy, clip_grad_norm: 1, ddp: {static_graph: true}"),
        ("max_epochs: 2", "max_epochs: 2, monitor: Precision_0"),
        ("max_epochs: 2", "max_epochs: 2, name: dtrain.trainer.Trainer"),
        ("  val: {split: val}", "  val: null"),
        ("+", "device: cuda:3"),
        ("+", "seed: null\nrun_name: null\nmlflow: null"),
        ("+", "mlflow: {tracking_uri: null, system_metrics: false}"),
    ],
)  # fmt: skip
def test_a_config_of_this_form_is_good(part: str, instead: str) -> None:
    assert part == "+" or part in GOOD
    assert told(f"{GOOD}{instead}\n" if part == "+" else GOOD.replace(part, instead)) == []


@pytest.mark.parametrize(
    ("metrics", "labels"),
    [
        ("{name: [torchmetrics.Accuracy, 'torchmetrics:Precision'], task: binary}", ["Accuracy", "Precision"]),
        ("{name: MeanSquaredError}", ["MeanSquaredError"]),
        ("[{name: MeanSquaredError}, {name: MeanSquaredError, squared: false}, {name: soft}]", ["MeanSquaredError_0", "MeanSquaredError_1", "soft"]),
        ("{mse: {name: MeanSquaredError}, rmse: {name: MeanSquaredError, squared: false}}", ["mse", "rmse"]),
        ("[]", []),
    ],
)  # fmt: skip
def test_metrics_have_labels(metrics: str, labels: list[str]) -> None:
    config = from_mapping({"metrics": yaml.safe_load(metrics), "modules": ["parts"]})
    assert [key.removeprefix("metrics.") for key in calls(config) if key.startswith("metrics.")] == labels


def test_a_metric_by_its_full_path_takes_its_own_keys() -> None:
    config = from_mapping(
        {
            "metrics": {
                "name": ["torchmetrics.Accuracy", "torchmetrics.Precision"],
                "task": "binary",
                "Precision": {"top_k": 2},
            }
        }
    )
    described = calls(config)
    assert described["metrics.Precision"].arguments == {"task": "binary", "top_k": 2}
    assert described["metrics.Precision"].path_of("top_k") == ("metrics", "Precision", "top_k")
    assert described["metrics.Accuracy"].arguments == {"task": "binary"}


def test_a_bare_name_that_is_found_twice_is_mentioned_and_the_first_wins(project: Path) -> None:
    (project / "twice.py").write_text("class Linear:\n    def __init__(self, dim): ...\nclass Accuracy: ...\n")
    Path("c.yaml").write_text(GOOD.replace("[parts]", "[parts, twice]").replace("Maze, dim: 8", "Linear, dim: 1"))
    config = load_config("c.yaml")
    assert calls(config)["model"].target.module == "twice"
    assert notes(config) == [
        "model.name: Linear is twice.Linear; also found: torch.nn.modules.linear.Linear",
        "metrics.name.0: Accuracy is twice.Accuracy; also found: torchmetrics.classification.accuracy.Accuracy",
    ]


def test_a_name_whose_meaning_only_a_run_can_tell_wins_too(project: Path) -> None:
    (project / "made.py").write_text("def make(): ...\nLinear = make()\n")
    config = from_mapping({"modules": ["made"], "model": {"name": "Linear"}})
    found = calls(config)["model"].found
    assert (found.target.module, found.also) == ("made", ("torch.nn.modules.linear.Linear",))


def test_a_module_that_may_have_any_name_wins_only_where_nothing_else_has_it(project: Path) -> None:
    (project / "lazy.py").write_text("def __getattr__(name): ...\n")
    for name, module in (("Linear", "torch.nn.modules.linear"), ("Anything", "lazy")):
        config = from_mapping({"modules": ["lazy"], "model": {"name": name}})
        assert calls(config)["model"].target.module == module


# -------------------------------------------------------------------------------------------------------------- types


@pytest.mark.parametrize(
    ("annotation", "fitting", "unfitting"),
    [
        ("int", "3 -3 0 0x10 010", "1.0 1e3 true null '3' [3] {a: 1} text"),
        ("float", "3 3.5 1e-3 .inf .nan", "true null '0.5' [1.0] text"),
        ("bool", "true false", "1 0 yes on null 'true'"),
        ("str", "text '3' yes 1:30 2024-01-01", "3 true null [a]"),
        ("int | None", "3 null", "3.5 text"),
        ("Optional[int]", "3 null", "3.5 text"),
        ("Union[int, str]", "3 text", "3.5 null"),
        ("typing.Union[int, typing.Optional[str]]", "3 text null", "3.5"),
        ("'int | None'", "3 null", "text"),
        ("None", "null", "3"),
        ("list", "[] [1] [a]", "3 {a: 1} null"),
        ("list[int]", "[] [1,2]", "[a] [1.5] 3 [null]"),
        ("Sequence[float]", "[1,2.5]", "[a]"),
        ("tuple[int, int]", "[1,2]", "[1] [1,2,3] [1,a]"),
        ("tuple[int, ...]", "[] [1,2,3]", "[a]"),
        ("Tuple[int, Tuple[int, int]]", "[1,[2,3]]", "[1,2]"),
        ("list[list[int]]", "[[1],[]]", "[1]"),
        ("list[int | None]", "[1,null]", "[a]"),
        ("dict", "{} {a: 1}", "3 [a]"),
        ("dict[str, int]", "{a: 1}", "[a]"),
        ("Mapping[str, Any] | None", "{a: 1} null", "3"),
        ("Literal['a', 'b']", "a b", "c 1 null"),
        ("Literal[1, -1, True, None]", "1 -1 true null", "2 false '1' 1.0"),
        ("Tensor", "[1,2.5] [[1],[2]] []", "[a] 3 text null"),
        ("Optional[torch.Tensor]", "[1] null", "3"),
        ("float | Tensor", "3.5 [1]", "text"),
        ("Callable", "", "text 3 null [a]"),
        ("Callable[[int], str] | None", "null", "text"),
        ("nn.Module", "", "text 3"),
        ("nn.Module | str", "text", "3"),
        ("Any", "3 text null [a] {a: 1}", ""),
        ("np.ndarray", "", "3"),
        ("_size_2_t", "3 [1,2] text", ""),  # an alias, which is not followed
        ("Annotated[int, 3]", "3 text", ""),
        ("type[X]", "", "3"),
        ("'not an ( annotation'", "3 text", ""),
    ],
)  # fmt: skip
def test_a_type_admits(annotation: str, fitting: str, unfitting: str) -> None:
    words = re.compile(r"\[.*?\](?=\s|$)|\{.*?\}|\S+")
    node = ast.parse(annotation, mode="eval").body
    for text in words.findall(fitting):
        assert wrong_type(parse(text, "x")[0], node) == "", text
    for text in words.findall(unfitting):
        assert wrong_type(parse(text, "x")[0], node) != "", text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda one: st.lists(one, max_size=3) | st.dictionaries(st.text(max_size=2), one, max_size=2),
    max_leaves=5,
)


@given(JSON, st.sampled_from(["int", "float", "str", "bool"]), st.booleans())
@settings(max_examples=200, deadline=None)
def test_plain_types_are_strict(thing: Any, name: str, optional: bool) -> None:
    node = ast.parse(f"{name} | None" if optional else name, mode="eval").body
    allowed = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}[name]
    assert (wrong_type(thing, node) == "") == (type(thing) in allowed or (optional and thing is None))


@pytest.mark.parametrize(
    ("thing", "annotation", "expected"),
    [
        (1e3, "int", "; write 1000"),
        (1.5, "int", ""),
        ("1e-3", "float", "; write 0.001 without quotes"),
        ("12", "int | None", "; write 12 without quotes"),
        ("yes", "bool", "; write true"),
        ("Off", "bool", "; write false"),
        ("None", "int | None", "; write null"),
        ("None", "int", ""),
        ("true", "bool", "; write true without quotes"),
        ("x", "int", ""),
        (True, "int", ""),
        (3, "str", ""),
    ],
)
def test_the_cure_is_told_where_another_type_was_meant(thing: Any, annotation: str, expected: str) -> None:
    assert correction(thing, ast.parse(annotation, mode="eval").body) == expected


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        ("Tensor | None", "Tensor"),
        ("float | Tensor", "Tensor"),
        ("list[float] | Tensor", ""),
        ("tuple[float, float]", "tuple"),
        ("tuple[float | Tensor, float | Tensor]", "tuple"),
        ("Sequence[float]", ""),
        ("tuple[int, ...] | list[float]", ""),
        ("_size_2_t", ""),
        ("Any", ""),
    ],
)
def test_a_list_becomes_what_alone_is_taken(annotation: str, expected: str) -> None:
    assert wanted_as([0.9, 0.99], ast.parse(annotation, mode="eval").body) == expected
    assert wanted_as(None, ast.parse(annotation, mode="eval").body) == ""


# ----------------------------------------------------------------------------------------------------------- mutations

DIALECT = """\
manual_seed: 3
modules: [parts]
model: {name: Old, hidden_size: 32, resnet: {num_layers: [1, 1], width_factor: 1}}
trainer:
  max_num_iterations: 100
  validate_after_iters: 10
  log_after_iters: 5
  eval_score_higher_is_better: true
  checkpoint_dir: ${DTRAIN_TEST_FOLDER:-runs}/x
  optimizer: {name: Adam, learning_rate: 0.01, weight_decay: 1e-5}
  lr_scheduler: {name: MultiStepLR, milestones: [10, 30], gamma: 0.2}
  mlflow_path: mlruns
  experiment_name: old
loaders:
  dataset: Shelf
  root: here
  num_workers: 0
  train: {transform: [{name: Wobble, p: 0.1}, {name: soft, power: 2}]}
  valid: {split: val}
loss: {name: soft, power: 2}
eval_metric: {names: [MeanSquaredError, soft], multiple: true, soft: {power: 3}}
"""
CONFIGS = (GOOD, DIALECT)
STRANGE = [
    None, True, 0, -1, 3, 10**30, 1.5, 1e3, float("nan"), float("inf"), "", "x", "yes", "os.system", "name", "${a.b}",
    "${", "1e-3", "é\u2028", "x" * 5000, [], [None], [[]], [1, "a"], ["Accuracy"] * 3, {}, {"name": None}, {"name": "Wobble"},
    {"name": "os.system"}, {"name": ["Maze"]}, {"name": {"name": "Maze"}}, {"a": {"b": {"c": []}}}, [{"name": "Wobble", "p": "x"}],
    {"name": "Maze", "dim": {"name": "Maze"}}, {"_delete_": True}, {"_delete_": 3}, {"_base_": "c.yaml"}, {"items": 1, "get": 2},
]  # fmt: skip
SNIPPETS = [
    "\n", "\t", " ", ":", ": ", "- ", "{", "}", "[", "]", "&a ", "*a", "<<: ", "!x ", "!!python/name:os.system ", "!!int ",
    "'", '"', "#", "|", ">", "%", "@", "`", "? ", "---\n", "...\n", "\0", "\x07", "\ufeff", "\u2028", "a: 1\n", "name: x\n",
    "${", "${x.y}", "$${", "_base_: c.yaml\n", "1e999", "__class__: 1\n", "model: 3\n", "\U0001f600",
]  # fmt: skip


def paths(tree: Any, path: tuple = ()) -> list[tuple]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [found for key, item in items for found in ((*path, key), *paths(item, (*path, key)))]


def at(tree: Any, path: tuple) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def mutated_tree(tree: Any, chance: random.Random) -> None:
    """One change to a tree of values: drop, rename, retype, swap, copy elsewhere."""
    there = paths(tree)
    if not there:
        return
    path, other = chance.choice(there), chance.choice(there)
    parent, key = at(tree, path[:-1]), path[-1]
    what = chance.randrange(6)
    if what == 0:
        del parent[key]
    elif what == 1 and isinstance(parent, dict):
        word = str(key)
        spot = chance.randrange(len(word) + 1)
        parent[chance.choice([word[:spot] + "x" + word[spot:], word[:-1], word.upper(), word[::-1], "name"])] = (
            parent.pop(key)
        )
    elif what == 2 and path[: len(other)] != other and other[: len(path)] != path:
        home, name = at(tree, other[:-1]), other[-1]
        parent[key], home[name] = copy.deepcopy(home[name]), copy.deepcopy(parent[key])
    elif what == 3 and isinstance(at(tree, other), dict) and other[: len(path)] != path:
        at(tree, other)[str(key)] = copy.deepcopy(parent[key])
    else:
        parent[key] = copy.deepcopy(chance.choice(STRANGE))


def mutated_text(text: str, chance: random.Random) -> str:
    """One change to a text: insert, cut out, cut off, double a line, swap lines."""
    spot, length = chance.randrange(len(text) + 1), chance.choice([1, 1, 2, 10, 60])
    lines = text.split("\n")
    line = chance.randrange(len(lines))
    return chance.choice(
        [
            text[:spot] + chance.choice(SNIPPETS) + text[spot:],
            text[:spot] + chance.choice(SNIPPETS) + text[spot:],
            text[:spot] + text[spot + length :],
            text[:spot],
            "\n".join([*lines[: line + 1], *lines[line:]]),
            "\n".join([*lines[:line], *lines[line + 1 :], lines[line]]),
        ]
    )


def mutant(seed: int) -> tuple[str, list[str]]:
    """A config file and overrides, some changes away from good ones."""
    chance = random.Random(seed)
    text = chance.choice(CONFIGS)
    if chance.random() < 0.6:
        tree = parse(text, "m.yaml")[0]
        for _ in range(chance.choice([1, 1, 2, 5])):
            mutated_tree(tree, chance)
        text = dump(tree)
    for _ in range(chance.choice([0, 0, 1, 1, 3])):
        text = mutated_text(text, chance)
    overrides = [mutated_text("optimizer.lr=1e-3", chance), mutated_text("metrics.name.0={name: x}", chance)]
    return text, overrides[: chance.choice([0, 0, 0, 1, 2])]


def only_lines_of_text(seed: int) -> bool:
    """Whether a mutant is refused; then by nothing but lines that name a place."""
    text, overrides = mutant(seed)
    Path("m.yaml").write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
    try:
        config = load_config("m.yaml", overrides)
        check(config)
        assert all(call.target for call in calls(config).values())
        assert to_plain(config)
        return False
    except ConfigError as error:
        assert error.mistakes
        for one in error.mistakes:
            assert "\n" not in str(one) and str(one).isprintable() and len(str(one)) < 20_000
            assert str(one).startswith(("m.yaml:", "argument ", "there is no file", "c.yaml")), str(one)
        return True


@pytest.mark.slow
@given(st.integers(0, 2**64))
@example(0)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_mutant_is_good_or_refused_in_lines(seed: int) -> None:
    only_lines_of_text(seed)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_ten_thousand_mutants_are_good_or_refused_in_lines() -> None:
    refused = sum(only_lines_of_text(seed) for seed in range(10_000))
    assert refused > 5000


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_fifty_mutants_end_the_program_with_2_and_a_line_each() -> None:
    seconds = []
    sayable = (seed for seed in itertools.count() if "\0" not in "".join(mutant(seed)[1]))
    for seed in itertools.islice(filter(only_lines_of_text, sayable), 50):
        _, overrides = mutant(seed)
        began = time.monotonic()
        command = [sys.executable, "-m", "dtrain", "config", "m.yaml", *overrides]
        done = subprocess.run(command, capture_output=True, timeout=200)
        seconds.append(time.monotonic() - began)
        lines = done.stderr.decode(errors="surrogateescape").splitlines()
        assert (done.returncode, done.stdout) == (2, b""), (seed, done)
        assert lines and all(line.startswith(("m.yaml:", "argument ")) for line in lines), (seed, lines)
    print(f"50 of 50; {sorted(seconds)[25]:.2f} s each, {max(seconds):.2f} s at most")


@pytest.mark.slow
def test_mutants_are_mostly_wrong() -> None:
    assert sum(only_lines_of_text(seed) for seed in range(60)) > 30


# ---------------------------------------------------------------------------------------------------- nothing imported


def test_checking_imports_nothing_that_the_config_names(project: Path) -> None:
    (project / "loud.py").write_text("raise SystemExit('imported')\nclass Loud: ...\n")
    Path("c.yaml").write_text(GOOD.replace("[parts]", "[parts, loud]").replace("Maze, dim: 8", "Loud"))
    code = """
import sys
from dtrain.config.check import check
from dtrain.config.load import load_config
sys.path.insert(0, "")
check(load_config("c.yaml"))
print(sorted({"torch", "torchmetrics", "numpy.linalg", "loud", "parts", "mlflow", "accelerate"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_a_model_may_compute_its_loss_unless_it_certainly_cannot(folder: Path) -> None:
    without = GOOD.replace("loss: {name: CrossEntropyLoss}\n", "")
    assert told(without) == []  # whatever the batch is: nothing is executed to know it
    unet = without.replace("{name: Maze, dim: 8}", "{name: UNet2D, in_channels: 1, out_channels: 10}")
    assert told(unet) == [
        "c.yaml:1:1: loss: missing, such as loss: {name: CrossEntropyLoss}"
        "; UNet2D.forward(x) takes no target, so it cannot compute a loss itself"
    ]
    (folder / "derived_unet.py").write_text(
        "from dtrain.components.models import UNet2D\nclass Mine(UNet2D):\n    pass\n"
    )
    mine = unet.replace("[parts]", "[parts, derived_unet]").replace("UNet2D", "Mine")
    assert told(mine) == []  # it may well override what forward calls


def test_lower_outputs_that_no_loss_looks_at_are_a_mistake() -> None:
    unet = "{name: UNet2D, in_channels: 1, out_channels: 10, deep_supervision: true}"
    config = GOOD.replace("{name: Maze, dim: 8}", unet)
    text = "c.yaml:2:57: model.deep_supervision: gives several outputs in training, and CrossEntropyLoss looks at the "
    (line,) = told(config)
    assert line.startswith(text) and line.endswith("loss: {name: DeepSupervision, loss: {name: ...}}")
    wrapped = config.replace("{name: CrossEntropyLoss}", "{name: DeepSupervision, loss: {name: CrossEntropyLoss}}")
    assert told(wrapped) == []
    assert told(config.replace("true}", "false}")) == []
    assert told(wrapped.replace(", task: multiclass, num_classes: 10", "")) == []  # as the loss within has it
