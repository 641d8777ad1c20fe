"""Weights for use: the averaged ones of the best checkpoint, or those of a file; what does not fit is one message."""

import pytest
import torch
from torch import nn

from dtrain.checkpoint import checkpoint_files
from dtrain.checkpoint.checkpoint_files import load
from dtrain.checkpoint.checkpoint_folder import Checkpoints
from dtrain.checkpoint.contents import CheckpointError
from dtrain.checkpoint.weights import load_for_use, load_weights, misfits_of
from dtrain.config.errors import ConfigError
from dtrain.distributed.ranks import Ranks

ALONE = Ranks(0, 0, 1, torch.device("cpu"))


def filled(value, size=2):
    return {"weight": torch.full((1, size), float(value)), "bias": torch.full((1,), float(value))}


@pytest.fixture
def checkpoints(tmp_path):
    """Step 1 is the best and has averaged weights; step 2 is the last."""
    found = Checkpoints(tmp_path / "checkpoints")
    found.save(1, filled(1), {"large": torch.ones(3)}, ema=filled(10), score=0.9)
    found.save(2, filled(2), {}, score=0.5)
    return found


@pytest.fixture
def hashed(monkeypatch):
    """The names of the files that were read for their SHA-256, in order."""
    names = []
    seal = checkpoint_files._seal
    monkeypatch.setattr(checkpoint_files, "_seal", lambda path: names.append(path.name) or seal(path))
    return names


def test_the_averaged_weights_of_the_best_checkpoint_are_used_and_each_file_is_hashed_once(checkpoints, hashed):
    model = nn.Linear(2, 1)
    load_for_use(model, ALONE, checkpoints, None)
    assert model.bias.item() == 10
    assert sorted(hashed) == ["ema.safetensors", "model.safetensors", "state.pt"]


def test_a_checkpoint_or_a_file_can_be_named(checkpoints, tmp_path):
    model = nn.Linear(2, 1)
    load_for_use(model, ALONE, checkpoints, checkpoints.folder / "step-00000002")
    assert model.bias.item() == 2
    torch.save({"model_state_dict": filled(3)}, tmp_path / "other.pt")
    load_for_use(model, ALONE, checkpoints, tmp_path / "other.pt")
    assert model.bias.item() == 3


def test_without_weights_the_model_is_left_as_it_is_or_refused(tmp_path):
    model, none = nn.Linear(2, 1), Checkpoints(tmp_path / "none")
    before = model.bias.item()
    load_for_use(model, ALONE, none, None)
    assert model.bias.item() == before
    with pytest.raises(ConfigError, match="holds no checkpoint; train first, or name one: --checkpoint"):
        load_for_use(model, ALONE, none, None, is_required=True)


def test_damage_is_found_before_a_named_checkpoint_is_used(checkpoints):
    file = checkpoints.folder / "step-00000002" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    with pytest.raises(ConfigError, match=r"not a whole checkpoint: model.safetensors: damaged"):
        load_for_use(nn.Linear(2, 1), ALONE, checkpoints, file.parent)


def test_what_was_verified_is_not_hashed_again(checkpoints, hashed):
    path = checkpoints.best()
    count = len(hashed)
    assert load(path, is_verified=True).weights["bias"].item() == 1
    assert load_weights(path, averaged=True, is_verified=True)["bias"].item() == 10
    assert len(hashed) == count
    (path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="cannot be read as a safetensors file"):
        load(path, is_verified=True)


def test_weights_that_do_not_fit_are_refused_with_what_does_not(checkpoints):
    expected = (
        r"step-00000001 does not fit the model: other shape: weight is \(1, 2\) in the file, \(1, 3\) in the model"
    )
    with pytest.raises(ConfigError, match=expected):
        load_for_use(nn.Linear(3, 1), ALONE, checkpoints, None)


class Counts(nn.Module):
    def get_extra_state(self):
        return {"seen": 1}

    def set_extra_state(self, state):
        pass


def test_an_entry_that_is_not_a_tensor_is_named_with_its_type():
    assert misfits_of(Counts(), {"more": torch.ones(2)}) == [
        "missing in the file: _extra_state (dict)",
        "not in the model: more (2,)",
    ]
