"""What is faster in a prediction on a CPU gives the same: layouts, the exact GroupNorm, oneDNN's kernel by its name."""

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dtrain.components.models.unet import UNet2D, UNet3D
from dtrain.predict import channels_last
from dtrain.predict.channels_last import laid_out
from dtrain.predict.kept_memory import memory_kept

LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("shape", [(1, 8, 24, 48, 48), (3, 12, 4, 5, 6), (2, 6, 40, 30), (1, 4, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_a_groupnorm_is_as_exact_as_in_the_usual_layout(
    shape: tuple[int, ...], offset: float, affine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(channels_last, "BLOCK", 5_000)  # so that there are several
    norm, images = nn.GroupNorm(2, shape[1], affine=affine), torch.randn(shape) + offset
    if affine:
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    exact = copy.deepcopy(norm).double()(images.double())
    usual = (norm(images) - exact).abs().max()
    with torch.no_grad(), laid_out(norm):
        found = norm(images.contiguous(memory_format=LAYOUTS[images.dim()]))
        assert torch.equal(norm(images), F.group_norm(images, 2, norm.weight, norm.bias))
    assert (found - exact).abs().max() <= max(4 * usual, 1e-6)
    assert "forward" not in vars(norm)


class Named(nn.Module):
    """What others build: convolutions of several kinds, and one that computes something of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 4, 3, padding=1)
        self.strided = nn.Conv3d(4, 8, (3, 1, 3), stride=(1, 2, 1), padding=(1, 0, 1), bias=False)
        self.grouped = nn.Conv3d(8, 8, 3, padding=2, dilation=2, groups=2)
        self.dilated = nn.Conv3d(8, 8, 3, padding=(2, 1, 1), dilation=(2, 1, 1))
        self.reflected = nn.Conv3d(8, 8, 3, padding=1, padding_mode="reflect")
        self.same = nn.Conv3d(8, 8, 3, padding="same")
        self.own = Own(8, 8, 3, padding=1)
        self.last = nn.Conv3d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x).relu()
        return x


class Own(nn.Conv3d):
    """Standardises its weights."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean(), bias)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2])
def test_any_model_gives_the_same(batch: int) -> None:
    torch.manual_seed(0)
    models = {
        Named(): (1, 9, 12, 10),
        UNet3D(1, 2, f_maps=[4, 8], num_groups=2): (1, 16, 24, 20),
        UNet2D(1, 2, f_maps=[4, 8], num_groups=2): (1, 40, 36),
        nn.Conv1d(1, 2, 3): (1, 30),
    }
    for model, side in models.items():
        images, before = torch.randn(batch, *side), copy.deepcopy(model.state_dict())
        with torch.no_grad():
            expected = model(images)
            with laid_out(model):
                torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
                with torch.autocast("cpu", torch.bfloat16):
                    assert model(images).dtype == torch.bfloat16
            assert torch.equal(model(images), expected)  # nothing is left of it
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        model.double()(images.double())


@pytest.mark.parametrize(
    ("sizes", "side", "more"),
    [
        ((1, 2), (5, 6, 16), {}),
        ((4, 4), (4, 7, 20), {"bias": False}),
        ((3, 3), (5, 4, 6), {"stride": (2, 1, 1), "padding": (0, 2, 1)}),
        ((2, 8), (3, 4, 10), {"kernel_size": (1, 3, 5), "padding": 0}),
        ((2, 1), (3, 4, 7), {"kernel_size": (3, 3, 2), "padding": 1}),
    ],
    ids=str,
)
@pytest.mark.parametrize("batch", [1, 2])
def test_voxels_side_by_side_are_those_of_a_convolution(
    sizes: tuple[int, int], side: tuple[int, ...], more: dict[str, Any], batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer = nn.Conv3d(*sizes, **({"kernel_size": 3, "padding": 1} | more))
    images, counts = torch.randn(batch, sizes[0], *side), []

    def noted(*given: Any) -> Tensor:
        counts.append(given[-1])
        return side_by_side(*given)

    side_by_side = channels_last._side_by_side
    monkeypatch.setattr(channels_last, "_side_by_side", noted)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    expected = copy.deepcopy(layer).double()(images.double())
    with torch.no_grad(), laid_out(layer):
        found = layer(images)
    assert found.is_contiguous(memory_format=torch.channels_last_3d) and found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-6
    assert len(counts) == 1 and counts[0] * sizes[1] <= 16 and counts[0] > 1


@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("made", [1, 2, 4, 8])
def test_no_voxel_comes_from_memory_that_is_not_the_images(channels: int, made: int) -> None:
    """A row of one step of several voxels was computed from it, where there is one channel: NaN now and then."""
    torch.manual_seed(0)
    layer = nn.Conv3d(channels, made, 3, padding=1)
    with torch.no_grad(), memory_kept(), laid_out(layer):
        for side in itertools.product((1, 4), (1, 3), (2, 4, 8, 16, 24, 32)):
            for batch in (1, 2):
                images = torch.randn(batch, channels, *side)
                expected = nn.functional.conv3d(images.double(), layer.weight.double(), layer.bias.double(), padding=1)  # type: ignore[union-attr]
                dirty = [torch.full((size,), math.nan) for size in (100, 1_000, 10_000, 100_000) for _ in range(4)]
                dirty.clear()  # memory that is free, and not of zeros
                found = layer(images)
                assert (found - expected).abs().max() < 1e-6, side


@pytest.mark.parametrize("more", [{"kernel_size": 1}, {"kernel_size": (3, 3, 1), "dilation": 2}])
def test_a_model_that_would_crash_onednn_is_left_as_it_is(more: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(16, 16, padding=1, stride=2, **more), nn.Conv3d(16, 2, 1))
    images = torch.randn(1, 16, 5, 5, 1)
    expected = copy.deepcopy(model).double()(images.double())
    with torch.no_grad(), laid_out(model):
        assert all(layer.weight.is_contiguous() and "_conv_forward" not in vars(layer) for layer in model)
        assert (model(images) - expected).abs().max() < 1e-6


@pytest.mark.slow
def test_nothing_is_left_to_the_slow_kernel_that_onednn_can_do() -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")

    def slow(model: nn.Module, images: Tensor) -> int:
        with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            model(images)
        return sum(event.count for event in profile.key_averages() if event.key == "aten::slow_conv3d_forward")

    model, images = (
        nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 4, 3, padding=1)),
        torch.randn(1, 1, 8, 9, 9),
    )
    assert slow(model, images) == 2  # else torch has learned it, and what calls it by its name is not needed any more
    with laid_out(model):
        assert slow(model, images) == 0


def test_the_names_of_torchs_that_are_used_are_there() -> None:
    method: Any = nn.Conv3d._conv_forward
    assert callable(method) and callable(torch.mkldnn_convolution)
    calls: list[int] = []
    layer = nn.Conv3d(1, 1, 3)
    layer._conv_forward = lambda *given: calls.append(1) or given[0]  # type: ignore[method-assign,assignment]
    layer(torch.randn(1, 1, 4, 4, 4))
    assert calls == [1]  # what a layer's forward calls


def test_layers_that_somebody_changed_are_left_alone() -> None:
    norm = nn.GroupNorm(1, 2)
    norm.forward = lambda images: images * 2  # type: ignore[method-assign]
    images = torch.randn(1, 2, 4, 4).contiguous(memory_format=torch.channels_last)
    with laid_out(norm):
        assert torch.equal(norm(images), images * 2)
    assert torch.equal(norm(images), images * 2)
