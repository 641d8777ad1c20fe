"""dtrain.load_model: the weights that the figures belong to, from whatever leads to them, in one call."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from whole_runs import Place

import dtrain


@pytest.fixture
def trained(place: Place, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run folder of a training with averaged weights whose best step is not its last; a module beside it."""

    def make() -> str:
        changes = {"trainer.ema_decay": 0.5, "trainer.max_epochs": 3, "loaders.test": {"size": 9}}
        place.run(
            place.config(
                "saved-model",
                **changes,
                **{"trainer.keep_best": 3, "trainer.monitor": "val/loss", "trainer.mode": "max"},
            )
        )
        return str(place.path("saved-model"))

    folder = Path(place.once("saved-model", make))
    monkeypatch.chdir(place.folder)
    return folder


def points(place: Place) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(7)), torch.zeros(5)


def by_hand(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """What toy.MLP computes."""
    hidden = torch.tanh(x @ weights["layers.0.weight"].T + weights["layers.0.bias"])
    return hidden @ weights["layers.4.weight"].T + weights["layers.4.bias"]


def test_from_whatever_leads_to_them(trained: Path, place: Place) -> None:
    x, _ = points(place)
    best = (trained / "checkpoints" / "best").resolve()
    averaged = by_hand(load_file(best / "ema.safetensors"), x)
    before = torch.get_rng_state()
    model = dtrain.load_model(trained)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(part.training for part in model.modules())
    with torch.no_grad():
        assert torch.allclose(model(x), averaged, atol=1e-6)
        for source in (trained / "checkpoints", best, best / "ema.safetensors"):
            assert torch.equal(dtrain.load_model(source)(x), model(x))
        raw = dtrain.load_model(best / "model.safetensors")
        assert torch.allclose(raw(x), by_hand(load_file(best / "model.safetensors"), x), atol=1e-6)
        assert not torch.allclose(raw(x), averaged)
        given = torch.nn.ModuleDict({"layers": torch.nn.Sequential(*dtrain.load_model(trained).layers)})
        assert dtrain.load_model(trained, model=given) is given


def test_they_are_those_of_the_best_figure(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["values"]["val/loss"] for line in lines if "val/loss" in line.get("values", {})}
    best = max(losses, key=lambda step: losses[step])
    assert best < max(losses)
    expected = load_file(trained / "checkpoints" / f"step-{best:08d}" / "ema.safetensors")
    assert torch.equal(dtrain.load_model(trained).layers[0].weight, expected["layers.0.weight"])


def test_what_it_says_of_mistakes(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(source: Path | str, **options: object) -> str:
        with pytest.raises(dtrain.ConfigError) as error:
            dtrain.load_model(source, **options)  # type: ignore[arg-type]
        return str(error.value)

    assert refusal("nowhere") == "nowhere: no such run folder, checkpoint, weight file or MLflow run id"
    assert refusal(tmp_path).startswith(f"{tmp_path} holds no checkpoint")
    alone = tmp_path / "alone.safetensors"
    save_file({"w": torch.ones(2)}, alone)
    assert refusal(alone) == f"no config.yaml beside {alone} or above it, so give the model: model=..."
    assert "does not fit the model: missing in the file: weight (2, 2)" in refusal(alone, model=torch.nn.Linear(2, 2))
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy, symlinks=True)
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace("- toy\n", "- toyy\n"))
    assert "modules.0: there is no module 'toyy' here or installed" in refusal(copy)
    (copy / "config.yaml").write_text(config.replace("name: MLP", "name: toy.MLP\n  _object_: {given: in Python}"))
    assert refusal(copy) == "model: toy.MLP was an object made in Python: make one again, and give it as model="
    for file in copy.glob("checkpoints/step-*/state.pt"):
        file.write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="state.pt: .*there is no other"):
        assert refusal(copy).startswith(f"no checkpoint in {copy / 'checkpoints'} is whole")


def test_a_test_names_the_step_of_the_weights(trained: Path, place: Place) -> None:
    best = int((trained / "checkpoints" / "best").resolve().name.removeprefix("step-"))
    for weights, expected in (((), f"  test  step {best}  loss "), (("best/ema.safetensors",), "  test  loss ")):
        named = ["--checkpoint", str(trained / "checkpoints" / weights[0])] if weights else []
        assert expected in place.run("test", str(place.folder / "saved-model.yaml"), *named).stdout
