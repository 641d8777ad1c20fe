"""The U-Net components: pytorch-3dunet's arguments, weights and values, and arguments that act."""

import importlib
import inspect
import textwrap
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dtrain import load_config
from dtrain.checkpoint.weights import load_weights
from dtrain.components.models import unet
from dtrain.components.models.unet import ResidualUNet2D, ResidualUNet3D, ResidualUNetSE3D, UNet2D, UNet3D
from dtrain.components.models.unet_blocks import SE_MODULES, Conv3d, ResNetBlock, Style
from dtrain.modelloader import get_model

ALL = (UNet3D, ResidualUNet3D, ResidualUNetSE3D, UNet2D, ResidualUNet2D)
SMALL = dict(f_maps=[8, 16, 32])


@pytest.fixture(scope="module")
def published() -> types.ModuleType:
    """pytorch-3dunet's own models."""
    return importlib.import_module("pytorch3dunet.unet3d.model")


def image(model: nn.Module, channels: int = 1, samples: int = 2) -> torch.Tensor:
    """A random image with odd sides."""
    return torch.randn(samples, channels, *((9, 17, 13) if model.dims == 3 else (17, 33)))


# What was published


@pytest.mark.parametrize(
    ("model", "arguments", "parameters"),
    [
        (UNet3D, dict(in_channels=1, out_channels=1), 16_318_691),
        (UNet3D, dict(in_channels=1, out_channels=2, f_maps=16), 1_021_132),
        (UNet3D, dict(in_channels=1, out_channels=3, f_maps=[8, 16, 32, 64]), 255_697),
        (UNet3D, dict(in_channels=1, out_channels=3, f_maps=(32, 64, 128, 256)), 4_081_333),
        (ResidualUNet3D, dict(in_channels=1, out_channels=1), 113_735_233),
        (ResidualUNet3D, dict(in_channels=1, out_channels=2, f_maps=16), 7_111_074),
        (ResidualUNet3D, dict(in_channels=1, out_channels=3, f_maps=[8, 16, 32, 64]), 442_459),
        (ResidualUNetSE3D, dict(in_channels=1, out_channels=1), 117_233_866),
        (ResidualUNetSE3D, dict(in_channels=1, out_channels=2, f_maps=16), 7_331_403),
        (ResidualUNetSE3D, dict(in_channels=1, out_channels=3, f_maps=[8, 16, 32, 64]), 456_562),
        (UNet2D, dict(in_channels=1, out_channels=1), 5_443_235),
        (UNet2D, dict(in_channels=3, out_channels=2, f_maps=16), 341_456),
        (UNet2D, dict(in_channels=3, out_channels=2, f_maps=[8, 16, 32, 64]), 85_772),
        (ResidualUNet2D, dict(in_channels=1, out_channels=1), 38_385_217),
        (ResidualUNet2D, dict(in_channels=1, out_channels=2, f_maps=16), 2_401_698),
        (ResidualUNet2D, dict(in_channels=3, out_channels=2, f_maps=[8, 16, 32, 64]), 149_858),
    ],
)
def test_parameter_counts_are_the_published_ones(model, arguments, parameters):
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in model(**arguments).parameters()) == parameters


def fill(model: nn.Module) -> None:
    """Weights that depend on their names alone."""
    for name, value in model.state_dict().items():
        z = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tuple(value.shape)).astype(np.float32)
        if value.ndim >= 2:
            z *= np.sqrt(2 / np.prod(value.shape[1:]))
        else:
            z = 1 + 0.1 * z if name.endswith("weight") else 0.1 * z
        value.copy_(torch.from_numpy(z))


@pytest.mark.parametrize(
    ("model", "out_channels", "shape", "mean", "std", "first"),
    [
        (UNet3D, 3, (1, 1, 16, 24, 32), -0.882572, 1.321191, [-0.03111, -0.83913, -0.99424]),
        (ResidualUNet3D, 3, (1, 1, 16, 24, 32), -1.654143, 2.849627, [-0.81966, -0.43494, -6.83655]),
        (ResidualUNetSE3D, 3, (1, 1, 16, 24, 32), -0.691289, 1.189853, [-0.42541, -0.03920, -0.78650]),
        (UNet2D, 2, (1, 3, 48, 64), -0.862024, 1.548329, [-1.93451, -2.21575, -1.48612]),
        (ResidualUNet2D, 2, (1, 3, 48, 64), -2.572233, 4.004230, [-3.18821, -2.38980, -1.30187]),
    ],
)
def test_logits_of_known_weights_are_the_published_ones(model, out_channels, shape, mean, std, first):
    module = model(shape[1], out_channels, f_maps=[8, 16, 32, 64]).eval()
    fill(module)
    ramp = np.arange(np.prod(shape), dtype=np.float64)
    with torch.no_grad():
        logits = module(torch.from_numpy(np.sin(ramp * 0.1).astype(np.float32).reshape(shape)))
    found = [logits.mean(), logits.std(), *logits.flatten()[:3]]
    torch.testing.assert_close(torch.stack(found), torch.tensor([mean, std, *first]), rtol=0, atol=2e-5)


def test_parameter_names_are_the_published_ones():
    conv = ["groupnorm.weight", "groupnorm.bias", "conv.weight"]
    double = [f"basic_module.SingleConv{number}.{name}" for number in (1, 2) for name in conv]
    assert list(UNet3D(1, 1, f_maps=[8, 16]).state_dict()) == [
        *(f"encoders.{level}.{name}" for level in (0, 1) for name in double),
        *(f"decoders.0.{name}" for name in double),
        *("final_conv.weight", "final_conv.bias"),
    ]
    residual = [f"basic_module.conv{number}.{name}" for number in (2, 3) for name in conv]
    projection = ["basic_module.conv1.weight", "basic_module.conv1.bias"]
    excitation = [
        f"basic_module.se_module.{name}.{kind}"
        for name in ("cSE.fc1", "cSE.fc2", "sSE.conv")
        for kind in ("weight", "bias")
    ]
    assert list(ResidualUNetSE3D(1, 1, f_maps=[8, 16]).state_dict()) == [
        *(f"encoders.{level}.{name}" for level in (0, 1) for name in (*projection, *residual, *excitation)),
        "decoders.0.upsampling.upsample.conv_transposed.weight",
        *(f"decoders.0.{name}" for name in (*residual, *excitation)),
        *("final_conv.weight", "final_conv.bias"),
    ]


@pytest.mark.parametrize("model", ALL)
def test_takes_pytorch_3dunets_arguments(published, model):
    theirs = inspect.signature(getattr(published, model.__name__)).parameters
    ours = inspect.signature(model).parameters
    names = [name for name in theirs if name != "kwargs"]
    assert list(ours)[: len(names)] == names
    assert all(ours[name].default in (theirs[name].default, None) for name in names)  # None: the same, said otherwise


VARIANTS = [
    {},
    dict(layer_order="cbl"),
    dict(layer_order="bcr"),
    dict(layer_order="cge", num_groups=4),
    dict(layer_order="cl"),
    dict(layer_order="crg", f_maps=[8, 12, 20], num_groups=4),
    dict(conv_upscale=1),
    dict(upsample="deconv"),
]


@pytest.mark.parametrize("arguments", VARIANTS, ids=str)
@pytest.mark.parametrize("model", ALL)
def test_weights_and_logits_equal_pytorch_3dunets(published, model, arguments):
    compare(published, model, arguments)


@pytest.mark.parametrize(
    ("model", "arguments"),
    [
        (UNet3D, dict(upsample="trilinear")),
        (UNet3D, dict(upsample="area")),
        (UNet3D, dict(layer_order="gcrd", dropout_prob=0.3)),
        (UNet2D, dict(upsample="bilinear")),
        (UNet2D, dict(layer_order="gcrD", dropout_prob=0.3)),
    ],
    ids=str,
)
def test_arguments_of_the_plain_unets_equal_pytorch_3dunets(published, model, arguments):
    compare(published, model, arguments)


def compare(published, model, arguments):
    """The same weights from the same seed, and the same logits in training and evaluation."""
    torch.manual_seed(1)
    theirs = getattr(published, model.__name__)(2, 3, **SMALL | arguments)
    torch.manual_seed(1)
    ours = model(2, 3, **SMALL | arguments)
    weights = theirs.state_dict()
    assert list(ours.state_dict()) == list(weights)
    assert all(torch.equal(value, weights[name]) for name, value in ours.state_dict().items())
    x = image(ours, channels=2)
    for training in (True, False):
        logits = []
        for module in (theirs, ours):
            torch.manual_seed(2)
            output = module.train(training)(x, **({"return_logits": True} if module is theirs else {}))
            logits.append(output[1] if module is theirs else output)
        torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-5)


def test_a_published_checkpoint_loads(published, tmp_path):
    theirs = published.ResidualUNetSE3D(1, 2, **SMALL)
    torch.save({"num_epochs": 3, "model_state_dict": theirs.state_dict()}, tmp_path / "best_checkpoint.pytorch")
    ours = ResidualUNetSE3D(1, 2, **SMALL)
    ours.load_state_dict(load_weights(tmp_path / "best_checkpoint.pytorch"))
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())


# What comes out


@pytest.mark.parametrize("model", ALL)
def test_the_output_is_logits_in_training_and_evaluation(model):
    module = model(1, 2, **SMALL)
    module.final_conv.bias.data = torch.tensor([5.0, -5.0])
    x = image(module)
    training, evaluation = module(x), module.eval()(x)
    assert training.shape == (2, 2, *x.shape[2:])
    assert training[:, 0].max() > 1 and training[:, 1].min() < 0
    torch.testing.assert_close(training, evaluation)


@pytest.mark.parametrize(
    ("arguments", "postprocess"),
    [
        ({}, "sigmoid"),
        (dict(final_sigmoid=False), "softmax"),
        (dict(is_segmentation=False), "none"),
        (dict(is_segmentation=False, final_sigmoid=False), "none"),
    ],
)
def test_what_makes_probabilities_is_said_and_not_done(arguments, postprocess):
    torch.manual_seed(1)
    plain = UNet2D(1, 2, f_maps=[8, 16])
    torch.manual_seed(1)
    module = UNet2D(1, 2, f_maps=[8, 16], **arguments)
    assert module.postprocess == postprocess
    x = image(module)
    assert torch.equal(module(x), plain(x))


def test_a_volume_of_one_slice_is_an_image():
    module = UNet2D(3, 2, **SMALL)
    x = image(module, channels=3)
    assert torch.equal(module(x.unsqueeze(2)), module(x).unsqueeze(2))


@pytest.mark.parametrize("model", ALL)
def test_any_size_works_that_is_not_pooled_away(model):
    module = model(1, 1, f_maps=[2, 4, 4], num_groups=1)
    for sides in ((4, 4, 4), (5, 7, 4), (9, 17, 33)):
        x = torch.randn(2, 1, *sides[-module.dims :])
        assert module(x).shape == x.shape
    with pytest.raises(ValueError, match=r"3 levels need an image of at least 4 x 4.* found .*3"):
        module(torch.randn(2, 1, *(4, 4, 3)[-module.dims :]))
    for shape in ((4, 4), (1, 1, 4), (2, 3, 8, 8, 8)[: module.dims + 2]):
        with pytest.raises(ValueError) as error:
            module(torch.randn(shape))
        assert f"{model.__name__}: expected (N, 1, " in str(error.value) and str(shape) in str(error.value)


@pytest.mark.parametrize("model", ALL)
def test_every_parameter_gets_a_finite_gradient(model):
    module = model(1, 2, **SMALL)
    module(image(module)).square().sum().backward()
    wrong = [n for n, p in module.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert wrong == []  # DistributedDataParallel would wait for them


@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 3), (5, 1, 3), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("depth", [1, 2, 5, 8])
def test_a_large_volume_in_two_halves_is_convolved_as_in_one(kernel, depth):
    torch.manual_seed(0)
    conv = Conv3d(2, 3, kernel, padding=tuple(side // 2 for side in kernel), cut_from=1).double()
    x = torch.randn(1, 2, depth, 6, 7, dtype=torch.float64, requires_grad=True)
    whole = F.conv3d(x, conv.weight, conv.bias, padding=conv.padding)
    torch.testing.assert_close(conv(x), whole)
    slope, inputs = torch.randn_like(whole), (x, conv.weight, conv.bias)
    for found, expected in zip(
        torch.autograd.grad(conv(x), inputs, slope), torch.autograd.grad(whole, inputs, slope), strict=True
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("has_bias", [True, False])
def test_channels_that_were_doubled_are_convolved_as_they_are(batch, has_bias):
    torch.manual_seed(0)
    conv = Conv3d(5, 4, (3, 3, 3), padding=(1, 1, 1), bias=has_bias, cut_from=1).double()
    conv.doubled = 3
    skip = torch.randn(batch, 2, 4, 6, 2, dtype=torch.float64, requires_grad=True)
    below = torch.randn(batch, 3, 2, 3, 1, dtype=torch.float64, requires_grad=True)
    x = torch.cat((skip, F.interpolate(below, size=(4, 6, 2))), 1)
    whole = F.conv3d(x, conv.weight, conv.bias, padding=1)
    made = conv(x)
    assert not torch.equal(made, whole), "by other sums"
    torch.testing.assert_close(made, whole)
    slope, inputs = torch.randn_like(whole), (skip, below, *conv.parameters())
    expected = torch.autograd.grad(whole, inputs, slope, retain_graph=True)
    for found, wanted in zip(torch.autograd.grad(made, inputs, slope, retain_graph=True), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    with torch.no_grad():
        assert torch.equal(conv(x), made), "a validation's as a training's"


def test_only_channels_of_equal_voxels_count_as_doubled():
    def doubled(**changes):
        model = UNet3D(1, 1, **{"f_maps": [8, 16, 32], **changes})
        return [each.doubled for each in model.modules() if isinstance(each, Conv3d) and each.doubled]

    assert (
        doubled() == doubled(layer_order="bcr") == doubled(layer_order="crd") == doubled(layer_order="Dcr") == [32, 16]
    )
    assert doubled(layer_order="dcr") == doubled(upsample="trilinear") == doubled(upsample="deconv") == []
    assert (
        doubled(pool_kernel_size=[1, 2, 2]) == doubled(conv_kernel_size=5) == doubled(conv_kernel_size=[1, 3, 3]) == []
    )
    model = UNet3D(1, 1, f_maps=[2, 4], num_groups=1)
    odd, even = torch.randn(1, 1, 7, 8, 9), torch.randn(1, 1, 6, 8, 10)
    torch.manual_seed(0)
    made = [model(x) for x in (odd, even)]
    model.decoders[0].basic_module.SingleConv1.conv.doubled = 0
    assert torch.equal(model(odd), made[0]), "an odd side was enlarged by other factors"
    torch.testing.assert_close(model(even), made[1])


def test_a_large_volume_is_left_to_no_slow_kernel_on_any_level():
    torch.manual_seed(0)

    def slow(model, x):
        with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            model(x)
        return sum(event.count for event in profile.key_averages() if event.key == "aten::slow_conv3d_forward")

    model, x = UNet3D(1, 1, f_maps=[2, 4, 8], num_groups=1), torch.randn(1, 1, 16, 64, 64)
    assert x.numel() == unet.LARGE
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    assert slow(model, x) <= 1  # final_conv, of one voxel
    assert slow(model, x[:, :, :8]) > 1  # which is small, and where torch still has such a kernel
    torch.testing.assert_close(model(x), model(x.repeat(2, 1, 1, 1, 1))[:1], rtol=1e-4, atol=1e-4)


def test_half_precision_gives_nearly_the_same():
    torch.manual_seed(1)
    module = ResidualUNetSE3D(1, 2, **SMALL)
    x = image(module)
    with torch.autocast("cpu", torch.bfloat16):
        half = module(x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), module(x), rtol=0.1, atol=0.1)


# Arguments that pytorch-3dunet swallows, or cannot reach


@pytest.mark.parametrize(
    ("block", "model"), [("DoubleConv", UNet3D), ("ResNetBlock", ResidualUNet3D), ("ResNetBlockSE", ResidualUNetSE3D)]
)
@pytest.mark.parametrize("start", [UNet3D, ResidualUNetSE3D])
def test_basic_module_makes_one_network_out_of_another(start, block, model):
    torch.manual_seed(1)
    named = start(1, 2, basic_module=block, **SMALL)
    torch.manual_seed(1)
    expected = model(1, 2, **SMALL)
    assert list(named.state_dict()) == list(expected.state_dict())
    x = image(named)
    assert torch.equal(named(x), expected(x))


def test_thick_slices_are_pooled_in_the_plane_only():
    for model in (UNet3D, ResidualUNet3D):
        module = model(1, 2, pool_kernel_size=[1, 2, 2], **SMALL)
        sizes = []
        module.encoders[2].register_forward_hook(lambda *call, sizes=sizes: sizes.append(tuple(call[2].shape[2:])))
        x = torch.randn(1, 1, 1, 8, 12)
        assert module(x).shape == (1, 2, 1, 8, 12)
        assert sizes == [(1, 2, 3)]
    deconvolutions = [part for part in module.modules() if isinstance(part, nn.ConvTranspose3d)]
    assert [part.stride for part in deconvolutions] == [(1, 2, 2)] * 2


def test_the_kernel_of_convolutions_is_real():
    torch.manual_seed(0)
    module = ResidualUNet3D(
        1, 1, conv_kernel_size=[1, 3, 3], conv_padding=[0, 1, 1], pool_kernel_size=[1, 2, 2], **SMALL
    )
    kernels = {name: tuple(w.shape[2:]) for name, w in module.named_parameters() if w.dim() == 5 and w.shape[-1] > 1}
    assert len(kernels) == 2 * 5 + 2 and set(kernels.values()) == {(1, 3, 3)}  # five blocks, two deconvolutions
    x = image(module, samples=1)
    moved = x.clone()
    moved[:, :, 3:] += 1  # slices are independent of one another but for the norms' statistics
    module = ResidualUNet3D(
        1, 1, conv_kernel_size=[1, 3, 3], pool_kernel_size=[1, 2, 2], layer_order="cr", **SMALL
    ).eval()
    torch.testing.assert_close(module(x)[:, :, :3], module(moved)[:, :, :3])
    assert UNet2D(1, 1, conv_kernel_size=5, **SMALL)(torch.randn(1, 1, 12, 12)).shape == (1, 1, 12, 12)


def test_average_pooling_is_real():
    torch.manual_seed(1)
    highest = UNet2D(1, 1, **SMALL)
    torch.manual_seed(1)
    mean = UNet2D(1, 1, pool_type="avg", **SMALL)
    x = image(mean)
    assert not torch.allclose(mean(x), highest(x))
    pooled = mean.encoders[1].pooling(x)
    torch.testing.assert_close(pooled[..., 0, 0], x[..., :2, :2].mean(dim=(-2, -1)))


def test_minus_one_group_is_one_group_per_channel():
    torch.manual_seed(0)
    module = UNet3D(3, 1, f_maps=[6, 10], num_groups=-1)
    norms = [part for part in module.modules() if isinstance(part, nn.GroupNorm)]
    assert [(part.num_groups, part.num_channels) for part in norms] == [
        *((3, 3), (3, 3), (6, 6), (6, 6)),  # the encoders: 3 -> 3 -> 6 and 6 -> 6 -> 10
        *((16, 16), (6, 6)),
    ]
    x = torch.randn(1, 3, 4, 4, 4)
    scaled = x * torch.tensor([1.0, 10.0, 100.0]).reshape(3, 1, 1, 1)
    torch.testing.assert_close(module(scaled), module(x), rtol=1e-3, atol=1e-3)  # as each channel is normalised


@pytest.mark.parametrize("model", [UNet3D, ResidualUNet3D, ResidualUNetSE3D, UNet2D])
@pytest.mark.parametrize("letter", ["d", "D"])
def test_dropout_has_the_given_rate_and_acts_in_training_only(model, letter):
    module = model(1, 1, layer_order=f"gcr{letter}", dropout_prob=0.4, **SMALL)
    layer = nn.Dropout if letter == "d" else nn.Dropout3d if module.dims == 3 else nn.Dropout2d
    rates = [part.p for part in module.modules() if type(part) is layer]
    assert rates == [0.4] * 2 * 5  # two in each of three blocks on the way down and two on the way up
    x = image(module)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


@pytest.mark.parametrize(
    ("order", "inner", "outer"),
    [
        ("cl", lambda x: F.leaky_relu(x, 0.01), lambda x: F.leaky_relu(x, 0.1)),
        ("ce", F.elu, F.elu),
        ("cr", F.relu, F.relu),
        ("c", lambda x: x, F.relu),
    ],
)
def test_the_residual_block_follows_its_definition(order, inner, outer):
    torch.manual_seed(0)
    block = ResNetBlock(2, 3, Style(2, (3, 3), order), encoder=True)
    x = torch.randn(1, 2, 5, 4)
    projected = block.conv1(x)
    expected = outer(block.conv3.conv(inner(block.conv2.conv(projected))) + projected)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("kind", ["nearest", "trilinear", "area", "deconv"])
def test_residual_networks_can_be_enlarged_in_every_way(kind):
    module = ResidualUNet3D(1, 2, f_maps=[8, 12, 20], num_groups=4, upsample=kind)
    x = image(module)
    assert module(x).shape == (2, 2, *x.shape[2:])


@pytest.mark.parametrize("dims", [2, 3])
def test_squeeze_and_excitation_follows_its_definition(dims):
    """By loops over channels and voxels."""
    torch.manual_seed(1)
    style = Style(dims, (3,) * dims)
    both = SE_MODULES["scse"](4, style)
    channel, spatial = SE_MODULES["cse"](4, style), SE_MODULES["sse"](4, style)
    channel.load_state_dict(both.cSE.state_dict())
    spatial.load_state_dict(both.sSE.state_dict())
    x = torch.randn(2, 4, *(2, 3, 2)[-dims:])
    with torch.no_grad():
        found = [module(x).numpy() for module in (channel, spatial, both)]
    weights = {name: value.numpy() for name, value in both.state_dict().items()}
    values = x.numpy()
    by_channel, by_voxel = np.empty_like(values), np.empty_like(values)
    for n in range(2):
        means = np.array([values[n, c].mean() for c in range(4)])
        hidden = np.maximum(weights["cSE.fc1.weight"] @ means + weights["cSE.fc1.bias"], 0)
        gates = 1 / (1 + np.exp(-(weights["cSE.fc2.weight"] @ hidden + weights["cSE.fc2.bias"])))
        for c in range(4):
            by_channel[n, c] = values[n, c] * gates[c]
        for place in np.ndindex(values.shape[2:]):
            voxel = values[(n, slice(None), *place)]
            gate = 1 / (1 + np.exp(-(weights["sSE.conv.weight"].reshape(4) @ voxel + weights["sSE.conv.bias"][0])))
            by_voxel[(n, slice(None), *place)] = voxel * gate
    for one, expected in zip(found, (by_channel, by_voxel, np.maximum(by_channel, by_voxel)), strict=True):
        np.testing.assert_allclose(one, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["scse", "cse", "sse"])
def test_squeeze_and_excitation_can_be_chosen(kind):
    for model in (UNet2D, UNet3D):
        module = model(1, 1, basic_module="ResNetBlockSE", se_module=kind, **SMALL)
        excited = [part for part in module.modules() if type(part) is SE_MODULES[kind]]
        assert len(excited) == 5  # three blocks on the way down, two on the way up
        x = image(module)
        assert module(x).shape == x.shape


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (dict(conv_padding=0), ["conv_padding is 0", "changes the size", "needs 1"]),
        (dict(conv_kernel_size=5, conv_padding=1), ["conv_padding is 1", "kernel of 5 needs 2"]),
        (dict(conv_kernel_size=[1, 3, 3], conv_padding=1), ["conv_padding is 1", "[0, 1, 1]"]),
        (dict(conv_kernel_size=2), ["conv_kernel_size is 2", "odd"]),
        (dict(conv_kernel_size=[3, 3]), ["conv_kernel_size is [3, 3]", "3 of them"]),
        (dict(pool_kernel_size=0), ["pool_kernel_size is 0", "positive"]),
        (dict(pool_kernel_size=1.5), ["pool_kernel_size is 1.5", "whole"]),
        (dict(pool_type="median"), ["pool_type is 'median'", "max, avg"]),
        (dict(basic_module="DenseBlock"), ["basic_module is 'DenseBlock'", "DoubleConv, ResNetBlock, ResNetBlockSE"]),
        (dict(se_module="cse"), ["se_module is 'cse'", "DoubleConv has none", "ResNetBlockSE"]),
        (dict(basic_module="ResNetBlockSE", se_module="es"), ["se_module is 'es'", "scse, cse, sse"]),
        (dict(upsample="none"), ["upsample is 'none'", "default", "nearest", "trilinear", "deconv"]),
        (dict(upsample="bilinear"), ["upsample is 'bilinear'", "trilinear"]),
        (dict(conv_upscale=3), ["conv_upscale is 3", "1, 2"]),
        (dict(layer_order="gr"), ["layer_order is 'gr'", "needed"]),
        (dict(layer_order="rcg"), ["layer_order is 'rcg'", "first"]),
        (dict(layer_order="gcrx"), ["layer_order is 'gcrx'", "possible"]),
        (dict(layer_order="gcrc"), ["layer_order is 'gcrc'", "at most once"]),
        (dict(num_groups=0), ["num_groups is 0", "-1"]),
        (dict(f_maps=[8, 12], num_groups=8), ["num_groups is 8", "20 channels", "1, 2, 4, 5, 10, 20"]),
        (dict(f_maps=[8]), ["[8]", "at least two"]),
        (dict(f_maps=8, num_levels=1), ["[8]", "at least two"]),
        (dict(f_maps=[8, 16], num_levels=3), ["2 levels", "num_levels says 3"]),
        (dict(f_maps=[8, 0]), ["[8, 0]"]),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(arguments, parts):
    with pytest.raises(ValueError) as error:
        UNet3D(1, 1, **{"f_maps": [8, 16]} | arguments)
    assert [part for part in parts if part not in str(error.value)] == []


def test_a_network_is_built_from_yaml(tmp_path: Path):
    text = """\
        model:
          name: ResidualUNet3D
          in_channels: 1
          out_channels: 2
          f_maps: [8, 16, 32]
          layer_order: gcr
          num_groups: 8
          final_sigmoid: false
          is_segmentation: true
          conv_padding: 1
          pool_kernel_size: [1, 2, 2]
          basic_module: ResNetBlockSE
          se_module: cse
        loaders: {name: Digits, train: {split: train}}
        loss: {name: CrossEntropyLoss}
        optimizer: {name: SGD, lr: 1e-3}
        trainer: {max_steps: 1}
        """
    (tmp_path / "unet.yaml").write_text(textwrap.dedent(text))
    module = get_model(load_config(tmp_path / "unet.yaml"))
    assert isinstance(module, unet.ResidualUNet3D)
    assert (module.pool, module.postprocess) == ((1, 2, 2), "softmax")
