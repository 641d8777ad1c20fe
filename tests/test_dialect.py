"""pytorch-3dunet's and PIDNet's files: configs mean here what they mean there, or are refused; checkpoints load."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from test_components_vit import published_vit  # noqa: F401  (a fixture)

from dtrain.checkpoint import CheckpointError, load_weights
from dtrain.components.models import PIDNet, ResidualUNet2D, ResidualUNet3D, ResidualUNetSE3D, UNet2D, UNet3D, ViT
from dtrain.config import load_config, notes_on, place_of, to_plain
from dtrain.modelloader import fitted, misfits_of
from dtrain.yamlfile import ConfigError

# ----------------------------------------------------------------------------------------------- foreign checkpoints


def saved_by_pytorch3dunet(folder: Path, model: torch.nn.Module, wrapped: bool = False) -> Path:
    """What pytorch-3dunet's own saver leaves after a validation."""
    from pytorch3dunet.unet3d.utils import save_checkpoint

    optimizer = torch.optim.Adam(model.parameters())
    sum(value.sum() for value in model.parameters()).backward()
    optimizer.step()
    weights = (torch.nn.DataParallel(model) if wrapped else model).state_dict()
    state = {
        "num_epochs": 3,
        "num_iterations": 700,
        "model_state_dict": weights,
        "best_eval_score": 0.7,
        "optimizer_state_dict": optimizer.state_dict(),
    }
    save_checkpoint(state, True, str(folder))
    return folder / "best_checkpoint.pytorch"


@pytest.mark.parametrize("wrapped", [False, True], ids=["one GPU", "DataParallel"])
@pytest.mark.parametrize("ours", [UNet3D, ResidualUNet3D, ResidualUNetSE3D, UNet2D, ResidualUNet2D])
def test_a_checkpoint_of_pytorch3dunet_gives_the_same_outputs(ours: type, wrapped: bool, tmp_path: Path) -> None:
    import pytorch3dunet.unet3d.model as theirs

    torch.manual_seed(1)
    settings = {"in_channels": 2, "out_channels": 3, "f_maps": [8, 16], "num_groups": 4, "final_sigmoid": False}
    old = getattr(theirs, ours.__name__)(**settings)
    new = ours(**settings)
    weights = fitted(new, load_weights(saved_by_pytorch3dunet(tmp_path, old, wrapped)))
    assert misfits_of(new, weights) == []
    new.load_state_dict(weights)
    image = torch.randn(1, 2, *[12] * new.dims)
    with torch.no_grad():
        probabilities, logits = old.eval()(image, return_logits=True)
        found = new.eval()(image)
    torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.softmax(1), probabilities, rtol=1e-5, atol=1e-5)


def test_a_published_pidnet_loads_from_beside_its_loss(tmp_path: Path) -> None:
    settings = {"num_classes": 3, "planes": 8, "ppm_planes": 8, "head_planes": 8}
    model = PIDNet(**settings)
    wrapper = torch.nn.Module()
    wrapper.model = model
    wrapper.sem_loss = torch.nn.CrossEntropyLoss(weight=torch.ones(3))
    torch.save(torch.nn.DataParallel(wrapper).state_dict(), tmp_path / "PIDNet_S.pt")
    weights = load_weights(tmp_path / "PIDNet_S.pt")
    assert "sem_loss.weight" in weights
    own = fitted(PIDNet(**settings), weights)
    assert own.keys() == model.state_dict().keys()
    assert all(torch.equal(own[name], value) for name, value in model.state_dict().items())


def test_a_model_with_a_part_named_model_keeps_its_names() -> None:
    model = torch.nn.ModuleDict({"model": torch.nn.Linear(2, 2)})
    assert fitted(model, model.state_dict()).keys() == {"model.weight", "model.bias"}


def test_weights_of_another_model_are_told_by_the_names_of_the_file() -> None:
    own, other = torch.nn.Linear(2, 2), {"model.a": torch.zeros(1), "loss.b": torch.zeros(1)}
    assert fitted(own, other) is other
    assert any("model.a" in line for line in misfits_of(own, fitted(own, other)))


def test_a_state_dict_of_vit_pytorch_loads(published_vit: type, tmp_path: Path) -> None:  # noqa: F811
    settings = dict(image_size=8, patch_size=4, num_classes=3, channels=1, dim=16, depth=1, heads=2, mlp_dim=16)
    old, new = published_vit(**settings).eval(), ViT(**settings).eval()
    torch.save(old.state_dict(), tmp_path / "vit.pt")
    weights = fitted(new, load_weights(tmp_path / "vit.pt"))
    assert misfits_of(new, weights) == []
    new.load_state_dict(weights)
    image = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(new(image), old(image), rtol=1e-5, atol=1e-5)


class Trap:
    """A pickle that would write a file as soon as it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "bare pickle"])
def test_a_checkpoint_with_code_in_it_runs_nothing(legacy: bool, tmp_path: Path) -> None:
    content = {"model_state_dict": UNet2D(1, 1, f_maps=[2, 4]).state_dict(), "best_eval_score": Trap(tmp_path / "ran")}
    file = tmp_path / "best_checkpoint.pytorch"
    if legacy:
        file.write_bytes(pickle.dumps(Trap(tmp_path / "ran"), protocol=2))
    else:
        torch.save(content, file)
    with pytest.raises(CheckpointError, match=r"best_checkpoint\.pytorch cannot be read without running code in it"):
        load_weights(file)
    assert not (tmp_path / "ran").exists()
