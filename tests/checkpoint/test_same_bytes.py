"""The same state gives the same bytes: in any process, and however the training came to it."""

import json
from pathlib import Path

import pytest
import torch
from whole_runs import EXACT, Place

from dtrain.checkpoint.checkpoint_files import MODEL, load
from dtrain.checkpoint.checkpoint_folder import Checkpoints


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_an_interrupted_training_ends_with_the_files_of_one_that_was_not(place: Place) -> None:
    settings = EXACT | {"loaders.num_workers": 0}
    place.run(place.config("bytes-whole", **settings), cold=True)
    parts = place.config("bytes-parts", **settings)
    place.run(parts, do="train 30 rank 0 TERM", expect=75, cold=True)
    place.run(parts, cold=True)
    whole, resumed = (files(place.path(f"bytes-{name}") / "checkpoints" / "last") for name in ("whole", "parts"))
    assert sorted(whole) == ["ema.safetensors", "manifest.json", "model.safetensors", "state.pt"]
    assert [name for name in whole if whole[name] != resumed[name]] == []


def test_metadata_is_in_order_whatever_the_names(tmp_path: Path) -> None:
    tied = torch.arange(3.0)
    weights = {'a "quoted" \\ name\n\x01': tied, "größe.重み": torch.ones(2, dtype=torch.bfloat16), "again": tied}
    checkpoints = Checkpoints(tmp_path, keep_last=30)
    for step in range(12):  # safetensors draws an order for each file
        checkpoints.save(step, weights, {})
    found = [(tmp_path / f"step-{step:08d}" / MODEL).read_bytes() for step in range(12)]
    assert len(set(found)) == 1
    size = int.from_bytes(found[0][:8], "little")
    assert list(json.loads(found[0][8 : 8 + size])["__metadata__"]) == ["aliases", "format"]
    back = load(tmp_path / "step-00000011").weights
    assert {name: value.tolist() for name, value in back.items()} == {n: v.tolist() for n, v in weights.items()}


def test_equal_texts_are_one_wherever_they_come_from(tmp_path: Path) -> None:
    """Pickle writes a text that it met before as a reference, if it is the same object."""
    made = "".join(["exp", "_avg"])
    for name, text in (("one", "exp_avg"), ("other", made)):
        Checkpoints(tmp_path / name).save(1, {}, {"exp_avg": 1, "list": [text, {text: "exp_avg"}]})
    one, other = (files(tmp_path / name / "step-00000001") for name in ("one", "other"))
    assert one == other
