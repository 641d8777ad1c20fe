"""TransUNet3D: one ConfigDict with the keys of the published configs, any size of volume, and clear refusals."""

import copy
from pathlib import Path

import pytest
import torch
import yaml
from ml_collections import ConfigDict, FrozenConfigDict
from torch.nn import functional as F

from dtrain.components.models.transunet import TransUNet3D
from dtrain.config.load import load_config
from dtrain.modelloader import get_model

YAML = """
name: dtrain.components.models.transunet:TransUNet3D
img_size: 32
in_channels: 1
n_classes: 2
hidden_size: 48
classifier: seg
patches: {grid: [4, 4, 4], size: [8, 8, 8]}
patch_size: 8
resnet: {num_layers: [1, 1, 1], width_factor: 1}
n_skip: 3
skip_channels: [32, 16, 8, 0]
decoder_channels: [32, 16, 8, 4]
transformer: {mlp_dim: 64, num_heads: 4, num_layers: 1, attention_dropout_rate: 0.0, dropout_rate: 0.1}
"""


def config(**changes) -> ConfigDict:
    """The config above with small widths; `a__b` changes a nested key, ... removes one."""
    values = yaml.safe_load(YAML)
    values["resnet"]["width_factor"] = 0.25
    for path, value in changes.items():
        *sections, key = path.split("__")
        section = values
        for name in sections:
            section = section[name]
        if value is ...:
            del section[key]
        else:
            section[key] = value
    return ConfigDict(values)


def parameters_of(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_example_of_the_seed_has_this_many_parameters():
    model = TransUNet3D(ConfigDict(yaml.safe_load(YAML)))
    assert parameters_of(model) == 1_141_186
    assert model(torch.randn(1, 1, 32, 32, 32)).shape == (1, 2, 32, 32, 32)


def test_a_config_file_gives_the_class_its_section_and_stays_as_it_is(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"model": yaml.safe_load(YAML), "trainer": {"max_epochs": 1}}))
    whole = load_config(file)
    before = whole.to_json()
    model = get_model(whole)
    assert type(model) is TransUNet3D
    assert whole.to_json() == before
    assert list(whole.model.skip_channels) == [32, 16, 8, 0]


@pytest.mark.parametrize("form", ["unlocked", "locked", "frozen"])
def test_the_callers_config_is_read_only(form):
    given = config(n_skip=1, skip_channels=[32, 16, 8, 4])
    given = FrozenConfigDict(given) if form == "frozen" else given.lock() if form == "locked" else given
    before = copy.deepcopy(given.to_dict())
    model = TransUNet3D(given)
    assert given.to_dict() == before
    reference = TransUNet3D(config(n_skip=1, skip_channels=[32, 0, 0, 0]))
    assert parameters_of(model) == parameters_of(reference)


@pytest.mark.parametrize("size", [(32, 24, 40), (32, 32, 32), (9, 17, 33), (1, 8, 64), (2, 3, 5), (1, 1, 1)])
def test_volumes_may_have_any_size(size):
    model = TransUNet3D(config())
    logits = model(torch.randn(2, 1, *size))
    assert logits.shape == (2, 2, *size)
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("size", "strides", "rest"),
    [
        (8, [2, 2, 2, 1], 1),
        (16, [2, 2, 2, 2], 1),
        (32, [2, 2, 2, 2], 2),
        (12, [2, 2, 1, 1], 3),
        ([4, 8, 16], [[2, 2, 2], [2, 2, 2], [1, 2, 2], [1, 1, 2]], 1),
    ],
)
def test_levels_halve_a_patch_as_often_as_it_can_be_halved(size, strides, rest):
    sizes = size if isinstance(size, list) else [size] * 3
    changes = dict(img_size=[2 * side for side in sizes], patches={"grid": [2, 2, 2], "size": size}, patch_size=...)
    model = TransUNet3D(config(**changes)).eval()
    volume = torch.randn(1, 1, *(2 * side for side in sizes))
    levels = [tuple(level.shape[2:]) for level in model.backbone(volume)]
    expected, shape = [], tuple(volume.shape[2:])
    for stride in strides:
        steps = stride if isinstance(stride, list) else [stride] * 3
        shape = tuple(side // step for side, step in zip(shape, steps, strict=True))
        expected.append(shape)
    assert levels == expected
    assert model.embed.stride == (rest,) * 3
    assert model(volume).shape == (1, 2, *volume.shape[2:])


def test_grid_and_size_give_one_another():
    whole = TransUNet3D(config())
    for patches in ({"grid": [4, 4, 4]}, {"size": [8, 8, 8]}, {"size": 8}, {"grid": 4}):
        assert TransUNet3D(config(patches=patches, patch_size=...)).grid == whole.grid == (4, 4, 4)
    by_patch_size = TransUNet3D(config(patches={}))
    assert by_patch_size.grid == (4, 4, 4)


def test_lists_and_tuples_are_alike():
    given = config(img_size=(32, 32, 32), decoder_channels=(8, 8, 8, 8), resnet__num_layers=(1, 2, 1))
    assert TransUNet3D(given)(torch.randn(1, 1, 8, 8, 8)).shape == (1, 2, 8, 8, 8)


def test_positions_tell_one_token_from_another():
    model = TransUNet3D(config()).eval()
    assert model.positions.shape == (1, 48, 4, 4, 4)
    assert model.positions.std() > 0.01
    flat = model(torch.ones(1, 1, 32, 32, 32))
    with torch.no_grad():
        model.positions.zero_()
    assert not torch.allclose(model(torch.ones(1, 1, 32, 32, 32)), flat)


def test_every_parameter_gets_a_gradient_with_and_without_skips():
    for changes in ({}, {"n_skip": 0}, {"n_skip": 2}, {"skip_channels": [0, 16, 0, 0]}):
        model = TransUNet3D(config(**changes))
        model(torch.randn(1, 1, 16, 16, 16)).square().sum().backward()
        missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert missing == []  # DistributedDataParallel would wait for them


def test_skip_connections_count():
    with_skips, without = (TransUNet3D(config(n_skip=number)) for number in (3, 0))
    assert parameters_of(with_skips) > parameters_of(without)
    no_channels = config(n_skip=0, skip_channels=...)
    assert parameters_of(TransUNet3D(no_channels)) == parameters_of(without)


@pytest.mark.parametrize("key", ["transformer__dropout_rate", "transformer__attention_dropout_rate"])
def test_dropout_acts_in_training_only(key):
    quiet = {"transformer__dropout_rate": 0.0, "transformer__attention_dropout_rate": 0.0}
    model = TransUNet3D(config(**quiet | {key: 0.5}))
    volume = torch.randn(1, 1, 32, 32, 32)
    assert not torch.equal(model(volume), model(volume))
    model.eval()
    assert torch.equal(model(volume), model(volume))
    model = TransUNet3D(config(**quiet))
    assert torch.equal(model(volume), model(volume))


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "elu", "gelu"])
def test_the_activation_is_the_convolutions(activation):
    torch.manual_seed(0)
    model = TransUNet3D(config(activation=activation))
    kinds = {type(module).__name__.lower() for module in model.backbone.modules()}
    assert activation.replace("_", "") in kinds
    assert model(torch.randn(1, 1, 8, 8, 8)).isfinite().all()


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_the_activation_of_the_published_configs_is_said_and_not_done(activation):
    torch.manual_seed(0)
    plain = TransUNet3D(config()).eval()
    torch.manual_seed(0)
    model = TransUNet3D(config(activation=activation)).eval()
    assert (model.postprocess, plain.postprocess) == (activation, "softmax")
    volume = torch.randn(1, 1, 8, 8, 8)
    assert torch.equal(model(volume), plain(volume))


def test_logits_are_not_squashed():
    model = TransUNet3D(config(final_activation=None)).eval()
    with torch.no_grad():
        model.head.bias += 50
        assert model(torch.randn(1, 1, 8, 8, 8)).min() > 10


def test_it_learns():
    torch.manual_seed(0)
    model = TransUNet3D(config(transformer__dropout_rate=0.0))
    label = torch.zeros(2, 16, 16, 16, dtype=torch.long)
    label[0, 4:10, 3:9, 8:], label[1, 8:, :6, 2:12] = 1, 1
    volume = label.unsqueeze(1) + 0.5 * torch.randn(2, 1, 16, 16, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = F.cross_entropy(model(volume), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"hidden_size": 192, "transformer__num_heads": 5}, ["192", "5 heads", "transformer.num_heads", "6, 8, 12"]),
        ({"hiden_size": 48}, ["unknown key hiden_size", "did you mean hidden_size"]),
        ({"transformer__dropout": 0.1}, ["unknown key transformer.dropout", "did you mean transformer.dropout_rate"]),
        ({"backbone_seg": {}}, ["unknown key backbone_seg", "possible: in_channels"]),
        ({"hidden_size": ...}, ["missing", "hidden_size"]),
        ({"transformer__mlp_dim": ...}, ["missing", "transformer.mlp_dim"]),
        ({"transformer": 3}, ["transformer is 3", "mapping"]),
        ({"patches": {}, "patch_size": ...}, ["patches needs grid", "size"]),
        ({"img_size": 40}, ["grid of [4, 4, 4]", "[8, 8, 8]", "img_size [40, 40, 40]"]),
        ({"patch_size": 16}, ["patch_size is 16", "[8, 8, 8]"]),
        ({"patches": {"size": 5}, "patch_size": ...}, ["[5, 5, 5]", "[32, 32, 32]"]),
        ({"decoder_channels": [8, 8]}, ["decoder_channels is [8, 8]", "4 whole numbers"]),
        ({"resnet__num_layers": [1, 0, 1]}, ["resnet.num_layers is [1, 0, 1]", "at least 1"]),
        ({"img_size": 32.0}, ["img_size is 32.0", "whole"]),
        ({"n_skip": 4}, ["n_skip is 4", "0 to 3"]),
        ({"skip_channels": ...}, ["skip_channels", "n_skip: 0"]),
        ({"activation": "tanh"}, ["'tanh'", "relu, leaky_relu, elu, gelu, softmax, sigmoid"]),
        ({"final_activation": "tanh"}, ["final_activation is 'tanh'", "logits"]),
        ({"classifier": "token"}, ["classifier is 'token'", "seg"]),
        ({"representation_size": 64}, ["representation_size is 64"]),
        ({"pretrained_path": "a.npz"}, ["'a.npz'", "trainer.pre_trained"]),
        ({"parallel": True}, ["parallel is True", "torchrun"]),
    ],
)
def test_what_is_not_possible_is_refused_by_name(changes, parts):
    with pytest.raises(ValueError) as error:
        TransUNet3D(config(**changes))
    assert [part for part in parts if part not in str(error.value)] == []


def test_keys_of_the_published_configs_that_say_nothing_are_taken():
    given = config(representation_size=None, pretrained_path=None, resnet_pretrained_path=None, parallel=False)
    assert TransUNet3D(given)(torch.randn(1, 1, 8, 8, 8)).shape == (1, 2, 8, 8, 8)


@pytest.mark.parametrize("given", [{"hidden_size": 48}, None, 3])
def test_another_object_than_a_config_is_refused(given):
    with pytest.raises(TypeError, match=r"one ml_collections.ConfigDict, found a"):
        TransUNet3D(given)
