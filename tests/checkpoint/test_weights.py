"""Weights for use: the averaged ones of the best checkpoint, or those of a file; what does not fit is one message."""

import hashlib
import json
import re
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from whole_runs import Place, figures, last

from dtrain.checkpoint import checkpoint_files
from dtrain.checkpoint.checkpoint_files import load
from dtrain.checkpoint.checkpoint_folder import Checkpoints
from dtrain.checkpoint.contents import CheckpointError
from dtrain.checkpoint.weights import load_for_use, load_weights, misfits_of, write_weights
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


@pytest.mark.parametrize("name", ["model.safetensors", "model"])
def test_damage_to_a_file_of_a_checkpoint_is_found_where_the_file_is_named(checkpoints, tmp_path, name):
    path = checkpoints.folder / "step-00000002"
    weights = load_file(path / "model.safetensors")
    if name == "model":  # as the shards of a sharded model lie
        (path / "model.safetensors").unlink()
        (path / "model").mkdir()
        file = path / "model" / "shard-00001-of-00001.safetensors"
        save_file(weights, file)
    else:
        file = path / name
    sealed = file.read_bytes()
    facts = json.loads((path / "manifest.json").read_text())
    seal = {"bytes": len(sealed), "sha256": hashlib.sha256(sealed).hexdigest()}
    facts["files"] = {file.relative_to(path).as_posix(): seal}
    del facts["sha256"]
    own = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps({**facts, "sha256": own}, indent=2) + "\n")
    assert load_weights(path / name).keys() == weights.keys()
    file.write_bytes(sealed[:-1] + bytes([sealed[-1] ^ 1]))
    damaged = re.escape(f"{file}: damaged, its SHA-256 is not the manifest's")
    for use in (load_weights, lambda source: write_weights(source, tmp_path / "one.safetensors")):
        with pytest.raises(CheckpointError, match=damaged):
            use(path / name)
    (path / "manifest.json").unlink()  # which may be all that is damaged
    assert load_weights(path / name).keys() == weights.keys()


def test_what_is_used_instead_of_the_best_checkpoint_is_named(checkpoints):
    best, last = checkpoints.best(), checkpoints.last()
    assert checkpoints.to_use() == best != last
    (best / "model.safetensors").write_bytes(b"cut")
    with pytest.warns(UserWarning, match=f"{best.name}/model.safetensors: damaged.*; {last.name} is used instead"):
        assert checkpoints.to_use() == last


def test_what_was_verified_is_not_hashed_again(checkpoints, hashed):
    path = checkpoints.best()
    count = len(hashed)
    assert load(path, is_verified=True).weights["bias"].item() == 1
    assert load_weights(path, averaged=True, is_verified=True)["bias"].item() == 10
    assert len(hashed) == count
    (path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="cannot be read as a safetensors file"):
        load(path, is_verified=True)


def test_a_process_hashes_a_file_once_unless_it_changes(checkpoints, hashed, monkeypatch):
    monkeypatch.setattr(checkpoint_files, "_SETTLED_SECONDS", -1.0)
    best, last = checkpoints.best(), checkpoints.last()
    assert best != last and len(hashed) == 5
    assert checkpoints.best() == best and load_weights(checkpoints.folder / "best")["bias"].item() == 1
    load(last)
    load_for_use(nn.Linear(2, 1), ALONE, checkpoints, None)
    assert len(hashed) == 5
    file = last / "model.safetensors"
    with open(file, "r+b") as stream:  # the same size, and soon after
        time.sleep(0.05)
        stream.seek(-1, 2)
        stream.write(b"\xff")
    with pytest.raises(CheckpointError, match=r"model.safetensors: damaged, its SHA-256"):
        load(last)


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


AVERAGING = {"trainer.ema_decay": 0.95, "optimizer.lr": 0.5, "trainer.pictures": False}
STILL = {"trainer.max_steps": 1, "optimizer.lr": 0.0, "trainer.max_epochs": None}


def test_a_training_begins_with_the_weights_that_another_ones_figures_belong_to(place: Place) -> None:
    place.run(place.config("averaging", **AVERAGING))
    best = place.path("averaging") / "checkpoints" / "best"
    step = json.loads((best / "manifest.json").read_text())["step"]
    raw, averaged = (load_file(best / f"{name}.safetensors")["layers.0.weight"] for name in ("model", "ema"))
    assert not torch.allclose(raw, averaged, atol=1e-3)

    def begun(name: str, wish: object) -> str:
        text = place.run(place.config(name, **STILL, **{"trainer.pre_trained": wish})).stdout
        assert ("its averaged weights, as it was validated and tested" in text) is ("raw" not in name)
        return text

    begun("from-best", str(best))
    assert torch.equal(last(place.path("from-best")).weights["layers.0.weight"], averaged)
    # Nothing is learnt at a rate of 0, so that the validation is that of the best checkpoint.
    figure = figures(place.path("averaging"))["val/loss"][step]
    assert figures(place.path("from-best"))["val/loss"][1] == pytest.approx(figure, rel=1e-5)
    begun("from-raw", {"path": str(best), "weights": "raw"})
    assert figures(place.path("from-raw"))["val/loss"][1] != pytest.approx(figure, rel=1e-3)
    assert torch.equal(last(place.path("from-raw")).weights["layers.0.weight"], raw)
    sent = [json.loads(line) for line in (place.path("averaging") / "metrics.jsonl").read_text().splitlines()]
    places = {line["path"].rpartition("/")[2]: line["to"] for line in sent if line["kind"] == "artifact"}
    assert (places["ema.safetensors"], places["model.safetensors"]) == ("model", "model/raw")
    config = place.config("from-none", **STILL)
    wish = f"trainer.pre_trained={{path: {place.path('from-raw')}/checkpoints/last, weights: averaged}}"
    text = place.run(config, wish, expect=2).stderr
    assert "trainer.pre_trained" in text and "holds no averaged weights: it was trained without" in text
    text = place.run(config, wish.replace("averaged}", "average}"), expect=2).stderr
    assert "expected one of 'raw', 'averaged'" in text and "Traceback" not in text


def test_averaged_weights_in_files_of_other_programs(tmp_path):
    model = nn.Linear(2, 1)
    average = torch.optim.swa_utils.AveragedModel(model)
    for file, content in {
        "timm.pth": {"state_dict": filled(1), "state_dict_ema": filled(2)},
        "torchvision.pth": {"model": filled(1), "model_ema": {f"module.{k}": v for k, v in filled(2).items()}},
        "nested.pth": {"model": filled(1), "model_ema": {"state_dict": filled(2)}},
    }.items():
        torch.save(content, tmp_path / file)
        found = [load_weights(tmp_path / file, averaged)["bias"].item() for averaged in (None, True, False)]
        assert found == [2, 2, 1], file
    torch.save({"model": filled(1)}, tmp_path / "plain.pth")
    assert load_weights(tmp_path / "plain.pth", None)["bias"].item() == 1
    with pytest.raises(CheckpointError, match="holds no averaged weights but the keys"):
        load_weights(tmp_path / "plain.pth", averaged=True)
    torch.save(average.state_dict(), tmp_path / "swa.pth")
    assert load_weights(tmp_path / "swa.pth").keys() == model.state_dict().keys()
