"""Checkpoints: what comes back, what is refused; kills, full disks, flipped bits and hostile files."""

import collections
import contextlib
import dataclasses
import datetime
import enum
import io
import json
import math
import os
import pathlib
import pickle
import random
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import warnings
from pathlib import Path

import ml_collections
import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from dtrain.checkpoint.checkpoint_files import _render, _seal, load, verify
from dtrain.checkpoint.checkpoint_folder import Checkpoints
from dtrain.checkpoint.contents import CheckpointError
from dtrain.checkpoint.weights import load_weights


@pytest.fixture
def tmp_path(tmp_path_factory):
    """In memory where there is such a folder: a kill is a kill there too, and hundreds of fsyncs wait for no disk."""
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path_factory.mktemp("x")))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


quick = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def same(a, b):
    """Equal to the bit, in type and in everything inside."""
    if isinstance(a, torch.Tensor):
        if type(b) is not torch.Tensor or a.dtype != b.dtype or a.shape != b.shape or a.layout != b.layout:
            return False
        a, b = (x.detach().to_dense().clone(memory_format=torch.contiguous_format).reshape(-1) for x in (a, b))
        return a.numel() == 0 or torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b) or (math.isnan(a) and math.isnan(b))
    return a == b


def weights_of(number, size=100):
    return {"w": torch.full((size,), float(number)), "b": torch.tensor(float(number))}


def steps_in(folder):
    return sorted(int(path.name[5:]) for path in Path(folder).glob("step-*"))


def names_in(folder):
    return sorted(path.name for path in Path(folder).iterdir())


@contextlib.contextmanager
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class Tied(nn.Module):
    """What models really have: tied weights, BatchNorm's counters, a mask, an extra state that is no tensor."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(12, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 12, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("mask", torch.ones(3, 3).triu().bool())
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.head(self.norm(self.embedding(x)))

    def get_extra_state(self):
        return {"calls": self.calls, "vocabulary": ["a", "b"], "table": torch.arange(3)}

    def set_extra_state(self, state):
        self.calls = state["calls"]


def trained(steps=3):
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    for _ in range(steps):
        model(torch.randint(0, 12, (8,))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return model, optimizer, scheduler


# What comes back


@pytest.mark.slow
def test_a_training_comes_back_to_the_bit_and_continues_alike(tmp_path_factory):
    torch.manual_seed(3)
    model, optimizer, scheduler = trained()
    scaler = torch.amp.GradScaler("cpu")
    state = {
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "scaler": scaler.state_dict(),
        "rng": {
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
            "numpy": np.random.default_rng(1).bit_generator.state,
        },
        "epoch": 1,
    }
    on_disk = tmp_path_factory.mktemp("run") / "checkpoints"
    path = Checkpoints(on_disk).save(3, model.state_dict(), state, ema=model.state_dict(), score=0.5)
    loaded = load(path)

    assert same(state, loaded.state)
    assert loaded.manifest["step"] == 3 and loaded.manifest["score"] == 0.5 and loaded.manifest["finite"] is True
    assert loaded.manifest["versions"]["torch"] == torch.__version__
    for weights in (loaded.weights, loaded.ema, load_weights(path)):
        other = Tied()
        other.load_state_dict(weights, strict=True)
        assert all(same(value, other.state_dict()[name]) for name, value in model.state_dict().items())
        assert other.calls == 3
    # load_state_dict upgrades old entries by these versions; a plain dict would say 'older than any'.
    assert loaded.weights._metadata == model.state_dict()._metadata

    twin = Tied()
    twin.load_state_dict(loaded.weights)
    twin_optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    twin_optimizer.load_state_dict(loaded.state["optimizer"])
    for one, its_optimizer in ((model, optimizer), (twin, twin_optimizer)):
        torch.set_rng_state(loaded.state["rng"]["torch"])
        one(torch.randint(0, 12, (8,))).square().mean().backward()
        its_optimizer.step()
    assert same(dict(model.state_dict()), dict(twin.state_dict()))


def test_tied_tensors_are_stored_once_and_tied_again(tmp_path):
    model = Tied()
    path = Checkpoints(tmp_path).save(1, model.state_dict(), {})
    with safe_open(path / "model.safetensors", framework="pt") as file:
        assert not {"embedding.weight", "head.weight"} <= set(file.keys())
        assert json.loads(file.metadata()["aliases"]) == {"head.weight": "embedding.weight"}
    weights = load(path).weights
    assert weights["head.weight"] is weights["embedding.weight"]


@pytest.mark.parametrize(
    "views",
    [
        lambda x: {"whole": x, "flat": x.view(-1)},
        lambda x: {"whole": x, "turned": x.t()},
        lambda x: {"whole": x, "half": x[:2], "overlapping half": x[1:3]},
        lambda x: {"even": x[:, ::2], "odd": x[:, 1::2]},
        lambda x: {"spread": x[:1].expand(5, 6), "one": x[0, 0]},
        lambda x: {"number": x, "bits": x.view(torch.int32)},
        lambda x: {
            "plain": torch.view_as_complex(x.view(4, 3, 2)),
            "conj": torch.view_as_complex(x.view(4, 3, 2)).conj(),
        },
        lambda x: {"plain": x, "empty": x[:0], "other empty": x[:0], "wider empty": x[:0].view(3, 0)},
    ],
)
def test_tensors_that_share_memory_in_other_ways_keep_their_values(tmp_path, views):
    weights = views(torch.arange(24.0).view(4, 6))
    loaded = load(Checkpoints(tmp_path).save(1, weights, {"views": weights}))
    assert all(same(weights[name].resolve_conj(), loaded.weights[name]) for name in weights)
    assert all(same(weights[name].resolve_conj(), loaded.state["views"][name]) for name in weights)
    assert set(loaded.weights) == set(weights)


def test_empty_tensors_are_not_taken_for_tied_ones(tmp_path):
    weights = load(Checkpoints(tmp_path).save(1, {"a": torch.empty(0), "b": torch.empty(0)}, {})).weights
    assert weights["a"] is not weights["b"]


dtypes = st.sampled_from(
    [
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.bool),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
        *(torch.float8_e4m3fn, torch.float8_e5m2),
    ]
)
forms = st.sampled_from(
    [
        lambda t: t,
        lambda t: t.transpose(0, -1) if t.dim() else t,
        lambda t: t[..., ::2] if t.dim() else t,
        lambda t: t[1:] if t.dim() else t,
        lambda t: t.expand(3, *t.shape),
        lambda t: t.unsqueeze(0),
        lambda t: nn.Parameter(t, requires_grad=t.is_floating_point()),
    ]
)


@st.composite
def tensors(draw):
    dtype, shape = draw(dtypes), draw(st.lists(st.integers(0, 4), max_size=4))
    raw = torch.tensor(list(draw(st.binary(min_size=16, max_size=16))), dtype=torch.uint8)
    if dtype == torch.bool:
        raw = raw & 1
    values = raw.view(dtype) if dtype != torch.bool else raw.bool()
    return draw(forms)(values.repeat(1 + math.prod(shape))[: math.prod(shape)].view(shape))


@quick
@given(st.dictionaries(st.text(max_size=8), tensors(), max_size=6), st.booleans())
def test_any_tensor_comes_back(tmp_path, weights, tie):
    if tie and weights:
        name, tensor = next(iter(weights.items()))
        weights[f"{name} tied"] = tensor
    loaded = load(Checkpoints(tmp_path).save(0, weights, {"same": dict(weights)}, ema=weights))
    for back in (loaded.weights, loaded.ema, loaded.state["same"]):
        assert set(back) == set(weights) and all(same(weights[name], back[name]) for name in weights)


def test_a_small_view_does_not_drag_its_whole_memory_along(tmp_path):
    large = torch.zeros(1_000_000)
    path = Checkpoints(tmp_path).save(1, {"a": large[:10]}, {"b": large[10:20]})
    assert sum(file.stat().st_size for file in path.iterdir()) < 10_000


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_what_safetensors_cannot_hold_is_kept_beside_it(tmp_path):
    weights = {
        "graph": torch.eye(4).to_sparse(),
        "rows": torch.eye(4).to_sparse_csr(),
        "phase": torch.ones(2, dtype=torch.complex128),
        "__metadata__": torch.ones(1),
        "plain": torch.ones(2),
        "layer._extra_state": None,
    }
    back = load(Checkpoints(tmp_path).save(1, weights, {})).weights
    assert set(back) == set(weights) and all(same(weights[name], back[name]) for name in weights)


def test_what_is_shared_in_the_state_is_shared_again(tmp_path):
    tensor, names = torch.ones(3), ["a"]
    state = load(Checkpoints(tmp_path).save(1, {}, {"a": tensor, "b": [tensor, names], "c": names})).state
    assert state["a"] is state["b"][0] and state["c"] is state["b"][1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_tensors_are_read_back_on_the_cpu(tmp_path):
    model = Tied().cuda()
    loaded = load(Checkpoints(tmp_path).save(1, model.state_dict(), {"x": torch.ones(3, device="cuda")}))
    assert loaded.weights["head.weight"] is loaded.weights["embedding.weight"]
    assert {loaded.weights["mask"].device.type, loaded.state["x"].device.type} == {"cpu"}
    assert torch.equal(loaded.weights["head.weight"], model.head.weight.cpu())


def test_saving_leaves_what_it_saves_alone(tmp_path):
    model, optimizer, _ = trained()
    weights, state = model.state_dict(), {"optimizer": optimizer.state_dict(), "kept": collections.OrderedDict(a=[1])}
    before = io.BytesIO()
    torch.save((weights, state), before)
    Checkpoints(tmp_path).save(1, weights, state)
    after = io.BytesIO()
    torch.save((weights, state), after)
    assert before.getvalue() == after.getvalue()
    assert weights["head.weight"].data_ptr() == model.head.weight.data_ptr()


# What is refused, because torch.load(weights_only=True) would refuse it


class Colour(enum.Enum):
    RED = 1


class Number(enum.IntEnum):
    ONE = 1


@dataclasses.dataclass
class Point:
    x: int = 1


Pair = collections.namedtuple("Pair", "a b")


class Text(str):
    pass


REFUSED = {
    "numpy.float64": np.float64(1.5),
    "numpy.int64": np.int64(1),
    "numpy.bool": np.bool_(True),
    "numpy.ndarray": np.arange(3),
    "pathlib.PosixPath": pathlib.PosixPath("runs"),
    "ml_collections.config_dict.config_dict.ConfigDict": ml_collections.ConfigDict({"lr": 1.0}),
    "ml_collections.config_dict.config_dict.FrozenConfigDict": ml_collections.FrozenConfigDict({"lr": 1.0}),
    "Colour": Colour.RED,
    "Number": Number.ONE,
    "Point": Point(),
    "Pair": Pair(1, 2),
    "Text": Text("a"),
    "collections.defaultdict": collections.defaultdict(list, a=[1]),
    "collections.deque": collections.deque([1]),
    "datetime.datetime": datetime.datetime(2026, 1, 2),
    "torch.Generator": torch.Generator(),
    "torch.nn.modules.linear.Linear": nn.Linear(1, 1),
    "frozenset": frozenset([1]),
    "range": range(3),
    "slice": slice(1),
    "ellipsis": ...,
    "type": int,
    "builtin_function_or_method": len,
    "bytes": b"",
    "int": 1 << 2039,
}
REFUSED_TENSORS = {
    "a subclass": lambda: torch.ones(2).as_subclass(type("Image", (torch.Tensor,), {})),
    "meta": lambda: torch.ones(2, device="meta"),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
    "qint8": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_type_that_could_not_be_loaded_is_refused_with_its_place(tmp_path, name):
    value = REFUSED[name]
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    with pytest.raises(Exception, match=r"(?i)weights.only"):  # else the refusal would be idle
        torch.load(file, weights_only=True)

    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for save in (checkpoints.check, lambda *given: checkpoints.save(7, *given)):
        with pytest.raises(CheckpointError) as error:
            save({"w": torch.ones(2)}, {"optimizer": {"groups": [0, {"lr": value}]}})
        line = next(line for line in str(error.value).splitlines() if "optimizer" in line)
        assert line.strip().startswith("state['optimizer']['groups'][1]['lr'] is a ")
        assert f"{name}: " in line
        assert "Possible: tensors, None, bool, int, float" in str(error.value)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.filterwarnings("ignore")  # torch's own, about what it deprecates
@pytest.mark.parametrize("name", REFUSED_TENSORS)
def test_a_tensor_without_plain_data_is_refused_wherever_it_is(tmp_path, name):
    tensor = REFUSED_TENSORS[name]()
    for weights, state, ema, place in (
        ({"a.b": tensor}, {}, None, "weights['a.b'] "),
        ({}, {"a": (1, tensor)}, None, "state['a'][1] "),
        ({}, {}, {"a.b": tensor}, "ema['a.b'] "),
    ):
        with pytest.raises(CheckpointError, match=name) as error:
            Checkpoints(tmp_path).save(1, weights, state, ema=ema)
        assert place in str(error.value)


@pytest.mark.parametrize(
    ("state", "place"),
    [
        ({Colour.RED: 1}, "a key of state"),
        ({"a": {torch.ones(1): 1}}, "a key of state['a']"),
        ({"a": {(1, np.int64(2)): 1}}, "a key of state['a'][1]"),
        ({"a": {1, 2, Number.ONE}}, None),  # equal to 1, so the set holds the plain one
        ({"a": {Colour.RED}}, "state['a'][0]"),
    ],
)
def test_keys_and_members_are_checked_too(tmp_path, state, place):
    if place is None:
        Checkpoints(tmp_path).save(1, {}, state)
    else:
        with pytest.raises(CheckpointError) as error:
            Checkpoints(tmp_path).save(1, {}, state)
        assert f"{place} is a " in str(error.value)


def test_what_hides_in_an_attribute_of_an_ordered_dict_is_found(tmp_path):
    state_dict = nn.Linear(1, 1).state_dict()
    state_dict._metadata[""]["where"] = Path("x")
    with pytest.raises(CheckpointError, match=r"state\['teacher'\].__dict__\['_metadata'\]\[''\]\['where'\]"):
        Checkpoints(tmp_path).save(1, {}, {"teacher": state_dict})


def test_a_state_without_end_is_refused(tmp_path):
    loop: list = [1]
    loop.extend([loop, loop])
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    for state in ({"a": loop}, {"a": deep}):
        with pytest.raises(CheckpointError, match="contains itself or lies deeper than 100 levels"):
            Checkpoints(tmp_path).save(1, {}, state)


def test_all_mistakes_are_reported_together_but_not_endlessly(tmp_path):
    with pytest.raises(CheckpointError) as error:
        Checkpoints(tmp_path).save(1, {}, {f"k{n}": Path("x") for n in range(30)})
    assert str(error.value).count("PosixPath: give str(x)") == 10 and "and 20 more" in str(error.value)


@pytest.mark.parametrize(
    ("value", "cure"),
    [
        (np.float64(1), "x.item()"),
        (Colour.RED, "x.value"),
        (Point(), "dataclasses.asdict(x)"),
        (ml_collections.ConfigDict(), "x.to_dict()"),
        (nn.Linear(1, 1), "x.state_dict()"),
        (torch.Generator(), "x.get_state()"),
        (collections.defaultdict(int), "dict(x)"),
        (Pair(1, 2), "tuple(x)"),
        (collections.deque(), "list(x)"),
        (datetime.date(2026, 1, 1), "x.isoformat()"),
    ],
)
def test_the_refusal_says_what_to_give_instead(tmp_path, value, cure):
    with pytest.raises(CheckpointError) as error:
        Checkpoints(tmp_path).save(1, {}, {"a": value})
    assert cure in str(error.value)


plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 2038), 1 << 2038),
    st.floats(),
    st.complex_numbers(allow_nan=False),
    st.text(st.characters(codec=None), max_size=20),
    st.binary(min_size=1, max_size=20),
    st.binary(max_size=9).map(bytearray),
    st.sampled_from([torch.Size([2, 3]), torch.Size([]), torch.bfloat16, torch.device("cuda:1"), torch.device("cpu")]),
    tensors(),
)
keys = st.one_of(st.text(max_size=9), st.integers(), st.none(), st.tuples(st.integers(), st.text(max_size=3)))


def nest(inner):
    pairs = st.dictionaries(keys, inner, max_size=4)
    return st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        pairs,
        pairs.map(collections.OrderedDict),
        st.dictionaries(keys, st.integers(), max_size=4).map(collections.Counter),
        st.sets(st.one_of(st.integers(), st.text(max_size=5)), max_size=4),
    )


def holds(value, kinds):
    if isinstance(value, Mixed):
        return True
    if isinstance(value, dict):
        return any(holds(item, kinds) for item in value.values())
    return isinstance(value, (list, tuple, set)) and any(holds(item, kinds) for item in value)


@quick
@given(st.dictionaries(keys, st.recursive(plain, nest, max_leaves=12), max_size=4))
def test_whatever_is_saved_can_be_loaded(tmp_path, state):
    path = Checkpoints(tmp_path).save(0, {}, state)
    assert same(state, load(path).state)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@settings(quick, max_examples=1000)
@given(st.dictionaries(keys, st.recursive(plain, nest, max_leaves=12), max_size=4))
def test_whatever_is_saved_can_be_loaded_a_thousand_times(tmp_path, state):
    path = Checkpoints(tmp_path).save(0, {}, state)
    assert same(state, load(path).state)


class Mixed:
    """A marker for a place in a nested value; a refused one is put there."""


@quick
@given(
    st.dictionaries(keys, st.recursive(st.one_of(plain, st.builds(Mixed)), nest, max_leaves=12), max_size=4),
    st.sampled_from(sorted(REFUSED)),
)
def test_nothing_is_saved_that_could_not_be_loaded(tmp_path, state, name):
    def put(value):
        if isinstance(value, Mixed):
            return REFUSED[name]
        if isinstance(value, dict):
            return type(value)({key: put(item) for key, item in value.items()})
        return type(value)(map(put, value)) if type(value) in (list, tuple) else value

    shutil.rmtree(tmp_path / "step-00000000", ignore_errors=True)
    try:
        path = Checkpoints(tmp_path).save(0, {}, put(state))
    except CheckpointError as error:
        assert holds(state, Mixed) and f"{name}: " in str(error)
        assert not (tmp_path / "step-00000000").exists()
    else:
        assert not holds(state, Mixed)
        torch.load(path / "state.pt", weights_only=True)


# Which are kept


def test_the_last_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2, keep_best=1)
    for step, score in enumerate([0.1, 0.9, 0.5, 0.2, 0.3]):
        checkpoints.save(step, weights_of(step), {}, score=score)
    assert steps_in(tmp_path) == [1, 3, 4]
    assert checkpoints.last().name == "step-00000004" and checkpoints.best().name == "step-00000001"
    assert [str((tmp_path / name).readlink()) for name in ("last", "best")] == ["step-00000004", "step-00000001"]
    assert names_in(tmp_path) == [".lock", "best", "last", "step-00000001", "step-00000003", "step-00000004"]


@pytest.mark.parametrize(
    ("settings", "scores", "kept", "best"),
    [
        ({"mode": "min"}, [3, 1, 2, 4], [1, 2, 3], 1),
        ({"keep_best": 2, "keep_last": 1}, [3, 9, 2, 7, 1], [1, 3, 4], 1),
        ({"keep_best": 0, "keep_last": 1}, [3, 1, 2], [2], 2),
        ({"keep_last": 9}, [1, 1, 1], [0, 1, 2], 0),  # the older of equals: a best is better than all before it
        ({}, [None, None, None, None], [2, 3], None),
        ({}, [math.nan, 0.5, math.nan, math.nan], [1, 2, 3], 1),
        ({"mode": "min"}, [math.nan, -math.inf, 5.0, math.nan, math.inf], [2, 3, 4], 2),
        ({"keep_last": 1, "keep_best": 3}, [1, 2, None, 0], [0, 1, 3], 1),
    ],
)
def test_rotation_by_score(tmp_path, settings, scores, kept, best):
    checkpoints = Checkpoints(tmp_path, **settings)
    for step, score in enumerate(scores):
        checkpoints.save(step, weights_of(step), {}, score=score)
    assert steps_in(tmp_path) == kept
    assert checkpoints.best() == (None if best is None else tmp_path / f"step-{best:08d}")
    assert (tmp_path / "best").is_symlink() == (best is not None)
    assert [verify(tmp_path / f"step-{step:08d}") for step in kept] == [[]] * len(kept)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_broken_weights_never_push_the_last_healthy_checkpoint_out(tmp_path, bad):
    checkpoints = Checkpoints(tmp_path, keep_last=2, keep_best=0)
    for step in range(3):
        checkpoints.save(step, weights_of(step), {})
    for step in range(3, 9):
        weights = weights_of(step)
        weights["w"][7] = bad
        checkpoints.save(step, weights, {}, score=100.0)
        assert steps_in(tmp_path) == sorted({2, max(step - 1, 2), step})
        assert load(tmp_path / f"step-{step:08d}").manifest["finite"] is False
    assert load(tmp_path / "step-00000002").manifest["finite"] is True
    checkpoints.save(9, weights_of(9), {})
    assert steps_in(tmp_path) == [8, 9]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e5m2, torch.complex64, torch.float64])
def test_nan_is_seen_in_every_dtype_and_in_the_average(tmp_path, dtype):
    good, bad = torch.ones(5, dtype=dtype), torch.tensor([1.0, math.nan]).to(dtype)
    for weights, ema, finite in ((good, good, True), (bad, good, False), (good, bad, False)):
        path = Checkpoints(tmp_path).save(1, {"w": weights}, {}, ema={"w": ema})
        assert load(path).manifest["finite"] is finite


def test_broken_weights_with_a_good_score_are_not_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=3)
    checkpoints.save(1, weights_of(1), {}, score=0.5)
    checkpoints.save(2, {"w": torch.tensor(math.nan)}, {}, score=0.9)
    assert checkpoints.best().name == "step-00000001"


def test_a_healthy_one_that_is_damaged_does_not_count_as_the_last_healthy(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=3, keep_best=0)
    for step in range(3):
        checkpoints.save(step, weights_of(step), {})
    flip(tmp_path / "step-00000002" / "state.pt", 100)
    few = Checkpoints(tmp_path, keep_last=1, keep_best=0)
    few.save(3, {"w": torch.tensor(math.nan)}, {})
    assert steps_in(tmp_path) == [1, 3]


def test_the_newest_is_the_one_saved_last_even_after_going_back(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2, keep_best=0)
    for step in (100, 200, 300, 120, 140):
        checkpoints.save(step, weights_of(step), {})
        assert checkpoints.last().name == f"step-{step:08d}"
    assert steps_in(tmp_path) == [120, 140]


def test_saving_a_step_again_replaces_it(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, weights_of(1), {"n": 1}, ema=weights_of(1), score=0.9)
    checkpoints.save(5, weights_of(2), {"n": 2}, score=0.1)
    loaded = load(checkpoints.last())
    assert loaded.state == {"n": 2} and loaded.ema is None and loaded.manifest["score"] == 0.1
    assert float(loaded.weights["b"]) == 2
    assert names_in(tmp_path) == [".lock", "best", "last", "step-00000005"]


def test_a_run_folder_can_be_moved_and_copied_without_links(tmp_path):
    checkpoints = Checkpoints(tmp_path / "a" / "checkpoints")
    checkpoints.save(1, weights_of(1), {}, score=1)
    (tmp_path / "a").rename(tmp_path / "b")
    assert load(tmp_path / "b" / "checkpoints" / "last").manifest["step"] == 1
    shutil.copytree(tmp_path / "b", tmp_path / "c", symlinks=False)  # as cp -L does: the links become folders
    copied = Checkpoints(tmp_path / "c" / "checkpoints")
    copied.save(2, weights_of(2), {}, score=2)
    assert copied.last().name == copied.best().name == "step-00000002"
    assert names_in(copied.folder) == [".lock", "best", "last", "step-00000001", "step-00000002"]


def test_nothing_there_is_no_checkpoint_and_makes_no_folder(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    with no_warning():
        assert checkpoints.last() is None and checkpoints.best() is None
    assert names_in(tmp_path) == []


def test_files_are_as_readable_as_the_umask_says(tmp_path):
    path = Checkpoints(tmp_path).save(1, weights_of(1), {}, ema=weights_of(1))
    (tmp_path / "plain").touch()
    expected = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {expected}


@pytest.mark.parametrize("settings", [{"mode": "best"}, {"keep_last": 0}, {"keep_best": -1}])
def test_settings_that_make_no_sense_are_refused(tmp_path, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Checkpoints(tmp_path, **settings)
    with pytest.raises(ValueError, match="step is -1"):
        Checkpoints(tmp_path).save(-1, {}, {})


# Damage


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.fixture
def three(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=3)
    for step in (1, 2, 3):
        model, optimizer, _ = trained(1)
        state = {"optimizer": optimizer.state_dict()}
        checkpoints.save(step, model.state_dict(), state, ema=model.state_dict(), score=step)
    return checkpoints


def test_one_flipped_bit_anywhere_is_found_and_the_file_named(three):
    seed = random.randrange(1 << 30)
    print("seed", seed)
    chance = random.Random(seed)
    path = three.last()
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        bits = range(len(whole) * 8)
        for bit in sorted({bits[0], bits[-1], *chance.sample(bits, 100)}):
            flip(file, bit)
            problems = verify(path)
            assert len(problems) == 1 and problems[0].startswith(f"{file.name}: "), (bit, problems)
            file.write_bytes(whole)
    assert verify(path) == []


def test_every_byte_of_the_manifest_matters(three):
    path = three.last()
    file = path / "manifest.json"
    whole = file.read_bytes()
    for position in range(len(whole)):
        flip(file, position * 8 + position % 8)
        assert verify(path)[0].startswith("manifest.json: damaged"), position
        file.write_bytes(whole)


DAMAGE = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "emptied": lambda file: file.write_bytes(b""),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\n"),
    "zeroed": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "missing": lambda file: file.unlink(),
    "another's": lambda file: shutil.copy(file.parents[1] / "step-00000001" / file.name, file),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "state.pt", "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_the_one_before_is_used(three, name, damage):
    path = three.folder / "step-00000003"
    DAMAGE[damage](path / name)
    # The manifest of another step, whole in itself, fits none of the files.
    assert any(problem.startswith(f"{name}: ") for problem in verify(path))
    with pytest.raises(CheckpointError, match=name):
        load(path)
    with pytest.raises(CheckpointError, match=name):
        load_weights(path)
    for find in (three.last, three.best):
        with pytest.warns(UserWarning, match=rf"step-00000003/{name}: .*step-00000002 is used instead"):
            assert find() == three.folder / "step-00000002"
    assert load(three.folder / "step-00000002").manifest["step"] == 2


def spoil(chance, path):
    """Damage one file at random, or swap two; the names of those that are no longer what they were."""
    names = ["model.safetensors", "ema.safetensors", "state.pt", "manifest.json"]
    name, other = chance.sample(names, 2)
    file, kind = path / name, chance.choice(["bit", "page", "cut", "swap"])
    content = file.read_bytes()
    if kind == "bit":
        flip(file, chance.randrange(8 * len(content)))
    elif kind == "page":
        begin = chance.randrange(len(content))
        file.write_bytes(content[:begin] + bytes(len(content[begin : begin + 4096])) + content[begin + 4096 :])
    elif kind == "cut":
        file.write_bytes(content[: chance.randrange(len(content))])
    else:
        file.write_bytes((path / other).read_bytes())
        (path / other).write_bytes(content)
    return [each for each in names if (path / each).read_bytes() != (path.parent / "whole" / each).read_bytes()]


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_thousand_damages_are_found_and_the_one_before_is_used(three):
    seed = random.randrange(1 << 30)
    print("seed", seed)
    chance = random.Random(seed)
    path, whole = three.folder / "step-00000003", three.folder / "whole"
    shutil.copytree(path, whole)
    found = 0
    while found < 1000:
        if names := spoil(chance, path):  # zeros may have been there before
            with pytest.warns(
                UserWarning, match=rf"step-00000003/({'|'.join(names)}): .*step-00000002 is used instead"
            ):
                assert three.last() == three.folder / "step-00000002"
            found += 1
            for name in names:
                shutil.copy(whole / name, path / name)
    with no_warning():
        assert three.last() == path


def test_a_foreign_file_is_named_but_what_systems_leave_is_not(three):
    path = three.folder / "step-00000003"
    (path / ".nfs0001").touch()
    (path / ".DS_Store").touch()
    assert verify(path) == []
    (path / "model-2.safetensors").touch()
    assert verify(path) == ["model-2.safetensors: a foreign file, not in the manifest"]


def test_a_checkpoint_under_the_name_of_another_is_found_out(three):
    shutil.rmtree(three.folder / "step-00000003")
    shutil.copytree(three.folder / "step-00000001", three.folder / "step-00000003")
    assert verify(three.folder / "step-00000003") == ["manifest.json: belongs to step 1, not to step-00000003"]
    (three.folder / "step-00000003").rename(three.folder / "my-favourite")
    assert verify(three.folder / "my-favourite") == []


def test_when_all_are_damaged_there_is_none_and_a_warning(three):
    for step in (1, 2, 3):
        flip(three.folder / f"step-0000000{step}" / "model.safetensors", 999)
    with pytest.warns(UserWarning, match=r"step-00000003/model.*step-00000002/model.*step-00000001/model.*no other"):
        assert three.last() is None


def test_a_manifest_of_another_format_is_not_guessed_at(three):
    path = three.folder / "step-00000003"
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    (path / "manifest.json").write_bytes(_render({**manifest, "format": 2}))
    assert verify(path) == ["manifest.json: of format 2; this dtrain reads format 1"]


@quick
@given(st.one_of(st.binary(max_size=80), st.text(max_size=80).map(str.encode), st.just(b"[" * 100_000)))
def test_any_manifest_is_answered_with_a_sentence(tmp_path, content):
    path = tmp_path / "step-00000001"
    path.mkdir(exist_ok=True)
    (path / "manifest.json").write_bytes(content)
    assert verify(path) == ["manifest.json: damaged, it differs from its own SHA-256"]


def test_a_folder_that_is_not_a_checkpoint_is_called_that(tmp_path):
    assert verify(tmp_path)[0].startswith("manifest.json: missing")
    assert verify(tmp_path / "nowhere")[0].startswith("manifest.json: missing")
    with pytest.raises(CheckpointError, match="is not a complete checkpoint"):
        load(tmp_path)


# Disks


def test_a_full_disk_is_seen_before_anything_is_written(mounted):
    folder = mounted("size=5m")
    checkpoints = Checkpoints(folder / "checkpoints")
    small, large = weights_of(1), weights_of(2, size=2_000_000)
    checkpoints.check(small, {})
    checkpoints.save(1, small, {})
    for attempt in (lambda: checkpoints.check(large, {}), lambda: checkpoints.save(2, large, {})):
        with pytest.raises(CheckpointError) as error:
            attempt()
        assert str(folder / "checkpoints") in str(error.value)
        assert "No space left on device (need: 8.0 MB, free: 5." in str(error.value)
        assert "The disk is full" in str(error.value) and "Older checkpoints are untouched" in str(error.value)
        assert isinstance(error.value.__cause__, OSError)
    assert names_in(checkpoints.folder) == [".lock", "last", "step-00000001"]
    assert load(checkpoints.last()).manifest["step"] == 1


@pytest.mark.parametrize("files", range(5))
def test_a_disk_that_fills_up_while_writing_leaves_the_old_and_nothing_else(mounted, files):
    folder = mounted("size=9m,nr_inodes=50")
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, weights_of(1), {})
    before = names_in(folder)
    # Room for bytes, but only for so many more files: it fails at the folder, at each of three files, then no more.
    used = 50 - os.statvfs(folder).f_ffree
    subprocess.run(["mount", "-o", f"remount,nr_inodes={used + files}", folder], check=True, timeout=200)
    if files < 4:
        with pytest.raises(CheckpointError, match=r"step-00000002 was not written: No space left on device"):
            checkpoints.save(2, weights_of(2), {})
        assert names_in(folder) == before
    else:
        checkpoints.save(2, weights_of(2), {})
    assert load(checkpoints.last()).manifest["step"] == (1 if files < 4 else 2)
    subprocess.run(["mount", "-o", "remount,nr_inodes=50", folder], check=True, timeout=200)
    assert checkpoints.save(3, weights_of(3), {}) == checkpoints.last()


@pytest.mark.parametrize("files", range(5))
def test_a_disk_that_takes_no_files_is_seen_before_the_first_step(mounted, files):
    folder = mounted("size=9m,nr_inodes=50")
    checkpoints = Checkpoints(folder)
    checkpoints.check(weights_of(1), {})
    before = names_in(folder)
    used = 50 - os.statvfs(folder).f_ffree
    subprocess.run(["mount", "-o", f"remount,nr_inodes={used + files}", folder], check=True, timeout=200)
    # Space there is, but a checkpoint is a folder of three files.
    with pytest.raises(CheckpointError, match=r"No space left on device") if files < 4 else contextlib.nullcontext():
        checkpoints.check(weights_of(1), {})
    assert names_in(folder) == before == [".lock"]


@contextlib.contextmanager
def file_size_limit(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("part", ["weights", "ema", "state"])
def test_a_write_that_fails_half_way_leaves_the_old_and_nothing_else(tmp_path, part):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, weights_of(1), {}, score=1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    given = {"weights": weights_of(2), "state": {}, "ema": weights_of(2), part: {"large": torch.ones(100_000)}}
    for step in (2, 1):  # a new one, and the replacement of an old one
        with file_size_limit(50_000), pytest.raises(CheckpointError) as error:
            checkpoints.save(step, given["weights"], given["state"], ema=given["ema"])
        assert f"step-0000000{step} was not written: File too large (need: 0.4 MB" in str(error.value)
        assert "ulimit -f" in str(error.value)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    checkpoints.save(2, given["weights"], given["state"], ema=given["ema"])
    assert checkpoints.last().name == "step-00000002"


def test_a_read_only_file_system_costs_an_error_and_can_still_be_read(mounted):
    folder = mounted("size=9m")
    Checkpoints(folder).save(1, weights_of(1), {}, score=1)
    (folder / ".tmp-step-00000002").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True, timeout=200)
    checkpoints = Checkpoints(folder)
    with no_warning():
        assert load(checkpoints.last()).manifest["step"] == load(checkpoints.best()).manifest["step"] == 1
    for attempt in (lambda: checkpoints.check({}, {}), lambda: checkpoints.save(2, weights_of(2), {})):
        with pytest.raises(CheckpointError, match=r"Read-only file system.*choose another folder"):
            attempt()


def test_a_folder_that_may_not_be_written_costs_an_error(tmp_path):
    (tmp_path / "a file").touch()
    with pytest.raises(CheckpointError, match="a file/checkpoints/step-00000001 was not written"):
        Checkpoints(tmp_path / "a file" / "checkpoints").save(1, {}, {})


def test_links_that_cannot_be_followed_are_not_needed(mounted):
    folder = mounted("size=9m,nosymfollow")
    checkpoints = Checkpoints(folder, keep_last=1)
    for step in (1, 2, 3):
        checkpoints.save(step, weights_of(step), {}, score=-step)
    with no_warning():
        assert checkpoints.last().name == "step-00000003" and checkpoints.best().name == "step-00000001"
    assert steps_in(folder) == [1, 3]


# Kills, and more than one writer


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_the_acknowledged_checkpoint(tmp_path):
    seed = random.randrange(1 << 30)
    report = in_a_process("random_kills", tmp_path, seed, 50)
    assert report["kills"] == 50
    assert report["failures"] == []


@pytest.mark.soak
def test_a_thousand_kills(tmp_path):
    assert (
        in_a_process("random_kills", tmp_path, random.randrange(1 << 30), 1000, timeout_seconds=900)["failures"] == []
    )


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_five_hundred_kills_on_a_disk_that_is_full_now_and_then(tmp_path, mounted):
    folder = mounted("size=3m")  # a checkpoint needs a quarter of a megabyte, and up to four are there at once
    report = in_a_process("random_kills", folder, random.randrange(1 << 30), 500, "full", timeout_seconds=1500)
    assert report["failures"] == [] and report["acknowledged"] > 100 and report["full"] > 50, report


@pytest.mark.slow
def test_a_kill_before_any_single_file_operation_leaves_the_acknowledged_checkpoint(tmp_path):
    report = in_a_process("kill_at_every_operation", tmp_path)
    assert report["failures"] == []
    assert report["operations"] > 40  # all of: a first save, a replacement, a rotation


def in_a_process(role, *arguments, timeout_seconds=400):
    """Run one of the functions below in a fresh interpreter, which may fork as it likes, and read its report."""
    command = [sys.executable, __file__, role, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_seconds, env=environment)
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    return json.loads(done.stdout.splitlines()[-1])


def fork(function):
    child = os.fork()
    if child == 0:
        try:
            function()
        finally:
            os._exit(3)
    return child


def save_numbered(checkpoints, step):
    """Everything in the checkpoint says `step`; every third one's weights are broken."""
    weights = weights_of(step, size=30_000)
    if step % 3 == 0:
        weights["nan"] = torch.tensor(math.nan)
    checkpoints.save(step, weights, {"step": step, "moments": torch.full((30_000,), float(step))}, score=step % 7)


def complaints(folder, acknowledged):
    """What a next start finds wrong after a kill; the newest must be at least the acknowledged step, in one piece."""
    checkpoints = Checkpoints(folder, keep_last=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        last = checkpoints.last()
    wrong = [str(warning.message) for warning in caught]
    wrong += [name for name in names_in(folder) if name.startswith((".tmp", ".old"))]
    if last is None:
        return wrong + (["nothing is left"] if acknowledged else [])
    loaded = load(last)
    numbers = {loaded.state["step"], int(loaded.state["moments"][-1]), int(loaded.weights["w"][-1])}
    if numbers != {loaded.manifest["step"]} or loaded.manifest["step"] < acknowledged:
        wrong.append(f"{numbers} in {last.name} after {acknowledged}")
    if acknowledged and not any(load(path).manifest["finite"] for path in Path(folder).glob("step-*")):
        wrong.append("no healthy checkpoint")
    return wrong


def fill(folder, chance):
    """Leave less room than a checkpoint needs, or enough for one."""
    (folder / "others.bin").unlink(missing_ok=True)
    free = shutil.disk_usage(folder).free
    with contextlib.suppress(OSError):
        (folder / "others.bin").write_bytes(bytes(max(0, free - chance.choice([50_000, 200_000, 1_000_000]))))


def random_kills(folder, seed, count, disk=""):
    chance = random.Random(int(seed))
    folder, acknowledged, failures, full = Path(folder), 0, [], 0
    torch.set_num_threads(1)
    Checkpoints(folder / "warm").save(1, weights_of(1), {})
    began = time.perf_counter()
    save_numbered(Checkpoints(folder / "warm"), 2)
    save_seconds = time.perf_counter() - began
    shutil.rmtree(folder / "warm")
    for _ in range(int(count)):
        reading, writing = os.pipe()

        def child(first=acknowledged + 1, writing=writing):
            checkpoints = Checkpoints(folder / "run", keep_last=1)
            for step in range(first, first + 1000):
                try:
                    save_numbered(checkpoints, step)
                except CheckpointError:  # the disk is full: the training continues
                    os.write(writing, struct.pack("q", -step))
                    continue
                os.write(writing, struct.pack("q", step))

        if disk == "full":
            fill(folder, chance)
        process = fork(child)
        os.close(writing)
        time.sleep(chance.uniform(0, 3 * save_seconds))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        with os.fdopen(reading, "rb") as pipe:
            told = [step for (step,) in struct.iter_unpack("q", pipe.read())]
        full += sum(step < 0 for step in told)
        acknowledged = max([acknowledged, *told])
        (folder / "run").mkdir(exist_ok=True)
        failures += complaints(folder / "run", acknowledged)
    return {
        "seed": seed,
        "save_seconds": save_seconds,
        "kills": int(count),
        "acknowledged": acknowledged,
        "full": full,
        "failures": failures,
    }


def kill_at_every_operation(folder):
    failures, operation = [], 0
    torch.set_num_threads(1)
    while operation < 1000:
        operation += 1
        run = Path(folder) / f"run-{operation}"
        reading, writing = os.pipe()

        def child(run=run, writing=writing, deadline=operation):
            seen = 0

            def count(event, arguments):
                nonlocal seen
                wrote = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
                if wrote or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.chmod"):
                    seen += 1
                    if seen == deadline:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(count)
            checkpoints = Checkpoints(run, keep_last=1)
            for step in (1, 2, 2, 3, 4):
                save_numbered(checkpoints, step)
                os.write(writing, struct.pack("q", step))
            os._exit(0)

        process = fork(child)
        os.close(writing)
        status = os.waitpid(process, 0)[1]
        with os.fdopen(reading, "rb") as pipe:
            told = pipe.read()
        if run.exists():
            acknowledged = struct.unpack("q", told[-8:])[0] if told else 0
            failures += [f"operation {operation}: {wrong}" for wrong in complaints(run, acknowledged)]
        shutil.rmtree(run, ignore_errors=True)
        if status == 0:
            break
        if not os.WIFSIGNALED(status):
            failures.append(f"operation {operation}: status {status}")
            break
    return {"operations": operation - 1, "failures": failures}


def test_a_start_does_not_disturb_a_writer_at_work_but_clears_up_after_a_dead_one(tmp_path):
    Checkpoints(tmp_path).save(1, weights_of(1), {})
    (tmp_path / ".tmp-step-00000002").mkdir()
    code = (
        "import sys, filelock as f; lock = f.FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); input()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        assert Checkpoints(tmp_path).last().name == "step-00000001"
        assert (tmp_path / ".tmp-step-00000002").exists()
    finally:
        holder.kill()
        holder.communicate(timeout=200)
    Checkpoints(tmp_path)
    assert not (tmp_path / ".tmp-step-00000002").exists()


def test_a_writer_that_never_ends_is_not_waited_for_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr("dtrain.checkpoint.checkpoint_folder.LOCK_TIMEOUT_SECONDS", 0.2)
    with FileLock(tmp_path / ".lock"), pytest.raises(CheckpointError, match="another process has been writing there"):
        Checkpoints(tmp_path).save(1, weights_of(1), {})


def test_threads_that_save_at_once_take_turns(tmp_path):
    errors = []

    def work(first):
        checkpoints = Checkpoints(tmp_path, keep_last=50)
        try:
            for step in range(first, 12, 3):
                checkpoints.save(step, weights_of(step), {"step": step})
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=200)
    assert errors == [] and steps_in(tmp_path) == list(range(12))
    manifests = [load(path).manifest for path in tmp_path.glob("step-*")]
    assert sorted(manifest["serial"] for manifest in manifests) == list(range(1, 13))


@pytest.mark.parametrize("step", [1, 2])
def test_an_interrupted_save_cleans_up_and_continues_as_the_interrupt(tmp_path, monkeypatch, step):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, weights_of(1), {})
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(torch, "save", lambda *given: signal.raise_signal(signal.SIGINT))  # Ctrl-C while it writes
            checkpoints.save(step, weights_of(2), {})
    finally:
        signal.signal(signal.SIGINT, before)
    assert names_in(tmp_path) == [".lock", "last", "step-00000001"]
    assert float(load(checkpoints.last()).weights["b"]) == 1


# Weights of others


def wrapped(model):
    return {
        "plain": model.state_dict(),
        "DDP": nn.DataParallel(model).state_dict(),  # the same names as DistributedDataParallel's
        "compiled": torch.compile(model).state_dict(),
        "DDP of compiled": nn.DataParallel(torch.compile(model)).state_dict(),
        "compiled DDP": torch.compile(nn.DataParallel(model)).state_dict(),
    }


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch.compile's own
def test_weights_of_ddp_and_compiled_models_load_from_every_kind_of_file(tmp_path):
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    for name, weights in wrapped(model).items():
        assert name == "plain" or set(weights) != set(model.state_dict())
        files = {"bare.pt": weights}
        files |= {f"{key}.pt": {key: weights, "epoch": 3} for key in ("model_state_dict", "state_dict", "model")}
        files["twice.pth"] = {"model": {"state_dict": weights}, "optimizer": {}}
        for file, content in files.items():
            torch.save(content, tmp_path / file)
        torch.save(weights, tmp_path / "legacy.pytorch", _use_new_zipfile_serialization=False)
        save_file(dict(weights), tmp_path / "x.safetensors")
        for file in [*files, "legacy.pytorch", "x.safetensors"]:
            found = load_weights(tmp_path / file)
            assert set(found) == set(model.state_dict()), (name, file)
            nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).load_state_dict(found, strict=True)
            # DataParallel moves the model to the GPU, where there is one
            assert all(same(value.cpu(), found[key]) for key, value in model.state_dict().items())


def test_a_submodule_that_is_compiled_or_called_module_is_understood(tmp_path):
    torch.save({"encoder._orig_mod.w": torch.ones(1), "head.module.w": torch.ones(1)}, tmp_path / "a.pt")
    assert set(load_weights(tmp_path / "a.pt")) == {"encoder.w", "head.module.w"}


def test_weights_of_a_checkpoint_by_link_with_tied_tensors_and_extra_state(tmp_path):
    model = Tied()
    Checkpoints(tmp_path).save(1, model.state_dict(), {"optimizer": torch.ones(9)}, score=1)
    weights = load_weights(tmp_path / "best")
    Tied().load_state_dict(weights, strict=True)
    assert weights["head.weight"] is weights["embedding.weight"]
    assert set(load_weights(tmp_path / "best" / "model.safetensors")) == set(weights) - {"_extra_state"}


def test_what_was_loaded_does_not_change_with_the_file(tmp_path):
    given = {**weights_of(1, size=50_000), "beside": torch.ones(50_000, dtype=torch.complex128)}
    path = Checkpoints(tmp_path).save(1, given, {"m": torch.ones(50_000)})
    loaded, weights = load(path), load_weights(path)
    for file in path.iterdir():
        with open(file, "r+b") as there:  # tensors that were the mapped file would now be zero
            there.write(bytes(file.stat().st_size))
    tensors = loaded.weights["w"], weights["w"], weights["beside"].real, loaded.state["m"]
    assert [float(tensor.sum()) for tensor in tensors] == [50_000] * 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 1, "optimizer": {"lr": 1.0}}, r"no weights but the keys \['epoch', 'optimizer'\].*model_state_dict"),
        (torch.ones(3), "no weights but a Tensor"),
        ([torch.ones(3)], "no weights but a list"),
        ({}, r"no weights but the keys \[\]"),
        ({"model": nn.Linear(1, 1)}, "torch.nn.modules.linear.Linear, which is code"),
        ({"w": torch.ones(1), "args": Path("x")}, "PosixPath, which is code"),
    ],
)
def test_a_torch_file_without_weights_says_what_it_holds(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=message):
        load_weights(tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "x"])
@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"not weights", b"PK\x03\x04" + b"x" * 50, b"\x80\x02}q\0."])
def test_a_file_that_is_something_else_is_refused_with_its_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"/{name} "):
        load_weights(tmp_path / name)


def test_no_file_at_all(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        load_weights(tmp_path / "nowhere.pt")
    with pytest.raises(CheckpointError, match="is not a complete checkpoint"):
        load_weights(tmp_path)


# Hostile files


class Payload:
    def __init__(self, call, *arguments):
        self.call = call, arguments

    def __reduce__(self):
        return self.call


def payloads(marker):
    touch = f"open({str(marker)!r}, 'w')"
    return {
        "system": Payload(os.system, f"touch {marker}"),
        "eval": Payload(eval, touch),
        "exec": Payload(exec, touch),
        "open": Payload(open, str(marker), "w"),
        "popen": Payload(subprocess.Popen, ["touch", str(marker)]),
        "mkdir": Payload(os.mkdir, str(marker)),
        "path": Payload(pathlib.Path.touch, marker),
        "map": Payload(list, Payload(map, Payload(eval, "eval"), [touch])),
    }


def write_tar(path, content):
    """The form torch had before 2017, which torch.load still reads."""
    with tarfile.open(path, "w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            data = pickle.dumps(content if name == "pickle" else 0, protocol=2)
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


WRITERS = {
    "zip": torch.save,
    "legacy": lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
    "pickle": lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2)),
    "tar": lambda content, path: write_tar(path, content),
}


def test_the_payloads_below_would_work(tmp_path):
    for name in payloads(tmp_path):
        marker = tmp_path / name
        with contextlib.suppress(Exception):
            pickle.loads(pickle.dumps(payloads(marker)[name]))
        for _ in range(4000):  # Popen's touch may take a moment
            if marker.exists():
                break
            time.sleep(0.05)
        assert marker.exists(), name


@pytest.mark.parametrize("writer", WRITERS)
def test_hostile_files_run_nothing(tmp_path, writer):
    marker = tmp_path / "marker"
    for name, payload in payloads(marker).items():
        for content in (payload, {"model": {"w": torch.ones(1)}, "optimizer": [payload]}, {"w": payload}):
            for file in ("x.pt", "x.safetensors"):
                WRITERS[writer](content, tmp_path / file)
                with pytest.raises(CheckpointError):
                    load_weights(tmp_path / file)
                assert not marker.exists(), (name, file)


def test_a_hostile_checkpoint_with_a_fitting_manifest_runs_nothing(tmp_path):
    path = Checkpoints(tmp_path).save(1, weights_of(1), {})
    marker = tmp_path / "marker"
    for payload in payloads(marker).values():
        torch.save({"state": payload, "weights": {}}, path / "state.pt")
        manifest = json.loads((path / "manifest.json").read_text())
        del manifest["sha256"]
        manifest["files"]["state.pt"] = _seal(path / "state.pt")
        (path / "manifest.json").write_bytes(_render(manifest))
        assert verify(path) == []
        for read in (load, load_weights):
            with pytest.raises(CheckpointError, match=r"state\.pt cannot be read without running code"):
                read(path)
        assert not marker.exists()


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_file_is_refused(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"x\.pt cannot be read without running code"):
        load_weights(tmp_path / "x.pt")


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
