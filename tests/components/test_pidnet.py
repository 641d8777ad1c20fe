"""PIDNet: the published sizes, outputs that plain losses can use, the loss by its definition, boundaries of labels."""

import functools

import pytest
import torch
from ml_collections import ConfigDict
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from dtrain.components.datasets.pidnet import PIDNetDatasetWrapper, boundary_target
from dtrain.components.losses.pidnet import PIDNetLoss, boundary_loss, ohem_cross_entropy
from dtrain.components.models.pidnet import VARIANTS, PIDNet, PIDNetWrapper

PARTS_OF_S = {
    "conv1": 10272, "layer1": 37120, "layer2": 131712, "layer3": 820992, "layer4": 3280384, "layer5": 1774592,
    "compression3": 8320, "compression4": 16512, "pag3": 4224, "pag4": 4224, "layer3_": 147968, "layer4_": 147968,
    "layer5_": 58112, "layer3_d": 29888, "layer4_d": 14720, "diff3": 36928, "diff4": 147584, "spp": 712384,
    "dfm": 33280, "layer5_d": 58112, "seghead_p": 76563, "seghead_d": 18657, "final_layer": 150419,
}  # fmt: skip


@functools.cache
def published(variant: str, num_classes: int = 19, augment: bool = True) -> PIDNet:
    m, n, planes, ppm_planes, head_planes = VARIANTS[variant]
    with torch.device("meta"):
        return PIDNet(m, n, num_classes, planes, ppm_planes, head_planes, augment)


def tiny(m: int = 2, num_classes: int = 3, augment: bool = True) -> PIDNet:
    return PIDNet(m, m + 1, num_classes, planes=4, ppm_planes=4, head_planes=8, augment=augment)


def parameters_of(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# The model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "parameters", "plain", "two_classes", "plain_two_classes", "keys", "plain_keys"),
    [
        ("s", 7_720_935, 7_625_715, 7_716_549, 7_623_522, 479, 453),
        ("m", 28_763_111, 28_538_515, 28_758_725, 28_536_322, 479, 453),
        ("l", 37_314_311, 36_939_571, 37_305_573, 36_935_202, 545, 519),
    ],
)
def test_sizes_are_the_published_ones(variant, parameters, plain, two_classes, plain_two_classes, keys, plain_keys):
    assert parameters_of(published(variant)) == parameters
    assert parameters_of(published(variant, augment=False)) == plain
    assert parameters_of(published(variant, num_classes=2)) == two_classes
    assert parameters_of(published(variant, num_classes=2, augment=False)) == plain_two_classes
    assert len(published(variant).state_dict()) == keys
    assert len(published(variant, augment=False).state_dict()) == plain_keys


def test_every_part_has_its_published_name_and_size():
    parts = {name: parameters_of(part) for name, part in published("s").named_children()}
    assert {name: size for name, size in parts.items() if size} == PARTS_OF_S


@pytest.mark.parametrize(("variant", "giga"), [("s", 47.19), ("m", 177.33), ("l", 274.93)])
def test_a_cityscapes_image_costs_what_the_published_model_costs(variant, giga):
    model = published(variant, augment=False).eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 1024, 2048, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(giga, abs=0.005)  # two operations per multiply-add


@pytest.mark.parametrize("m", [2, 3], ids=["light", "large"])
def test_in_training_main_comes_first_and_in_evaluation_alone(m):
    model, image = tiny(m), torch.randn(2, 3, 72, 40)
    main, detail, edges = model(image)
    assert (main.shape, detail.shape, edges.shape) == ((2, 3, 9, 5), (2, 3, 9, 5), (2, 1, 9, 5))
    # Main is what final_layer makes, and needs no other head.
    main.sum().backward()
    assert all(item.grad is None for head in (model.seghead_p, model.seghead_d) for item in head.parameters())
    assert all(item.grad is not None for item in model.final_layer.parameters())

    model.eval()
    plain = tiny(m, augment=False).eval()
    weights = model.state_dict()
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    assert torch.equal(model(image), plain(image))
    assert plain.train()(image).shape == (2, 3, 9, 5)


@pytest.mark.parametrize("m", [2, 3], ids=["light", "large"])
def test_all_three_branches_reach_the_main_output(m):
    model = tiny(m, augment=False)
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert [name for name, item in model.named_parameters() if item.grad is None] == []
    reached = {name.partition(".")[0] for name, item in model.named_parameters() if item.grad.any()}
    assert reached == {name.partition(".")[0] for name, _ in model.named_parameters()}


class Published:
    """The network as the authors' code computes it, from the weights alone: both heads, and ReLUs that work in place.

    `statistics`: normalise by the running ones, as in evaluation; else by the batch's.
    """

    def __init__(self, model, statistics):
        self.weights = {name: value.detach() for name, value in model.state_dict().items()}
        self.statistics, self.light = statistics, "spp.scale_process.2.weight" in self.weights

    def conv(self, x, name, stride=1, groups=1):
        weight = self.weights[f"{name}.weight"]
        bias = self.weights.get(f"{name}.bias")
        return F.conv2d(x, weight, bias, stride, padding=weight.shape[-1] // 2, groups=groups)

    def norm(self, x, name):
        part = {key: self.weights[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")}
        mean, var = part["running_mean"].clone(), part["running_var"].clone()
        return F.batch_norm(x, mean, var, part["weight"], part["bias"], training=not self.statistics)

    def conv_norm(self, x, name, stride=1):
        return self.norm(self.conv(x, f"{name}.0", stride), f"{name}.1")

    def norm_conv(self, x, name, at=0, groups=1):
        return self.conv(F.relu(self.norm(x, f"{name}.{at}")), f"{name}.{at + 2}", groups=groups)

    def block(self, x, name, stride=1, last_relu=True):
        """A basic block, or a bottleneck where there is a third convolution."""
        three = f"{name}.conv3.weight" in self.weights
        out = F.relu(self.norm(self.conv(x, f"{name}.conv1", 1 if three else stride), f"{name}.bn1"))
        out = self.norm(self.conv(out, f"{name}.conv2", stride if three else 1), f"{name}.bn2")
        if three:
            out = self.norm(self.conv(F.relu(out), f"{name}.conv3"), f"{name}.bn3")
        short = f"{name}.downsample"
        out = out + (self.conv_norm(x, short, stride) if f"{short}.0.weight" in self.weights else x)
        return F.relu(out) if last_relu and not three else out

    def layer(self, x, name, stride=1):
        count = len({key.split(".")[1] for key in self.weights if key.startswith(f"{name}.")})
        for number in range(count):  # the last block of several has no ReLU
            x = self.block(x, f"{name}.{number}", stride if number == 0 else 1, number == 0 or number < count - 1)
        return x

    def head(self, x, name):
        x = self.conv(F.relu(self.norm(x, f"{name}.bn1")), f"{name}.conv1")
        return self.conv(F.relu(self.norm(x, f"{name}.bn2")), f"{name}.conv2")

    def resize(self, x, like):
        return F.interpolate(x, size=list(like.shape[-2:]), mode="bilinear", align_corners=False)

    def pag(self, p, i, name):
        similar = (self.conv_norm(p, f"{name}.f_x") * self.resize(self.conv_norm(i, f"{name}.f_y"), p)).sum(1)
        share = torch.sigmoid(similar).unsqueeze(1)
        return (1 - share) * p + share * self.resize(i, p)

    def pool(self, x):
        first = self.norm_conv(x, "spp.scale0")
        up = []
        for number in range(1, 5):
            stride = 2**number
            small = F.avg_pool2d(x, 2 * stride + 1, stride, stride) if number < 4 else x.mean((2, 3), keepdim=True)
            up.append(self.resize(self.norm_conv(small, f"spp.scale{number}", at=1), x))
        if self.light:
            parts = [first, self.norm_conv(torch.cat([item + first for item in up], 1), "spp.scale_process", groups=4)]
        else:
            parts = [first]
            for number, item in enumerate(up, 1):
                parts.append(self.norm_conv(item + parts[-1], f"spp.process{number}"))
        return self.norm_conv(torch.cat(parts, 1), "spp.compression") + self.norm_conv(x, "spp.shortcut")

    def fuse(self, p, i, d):
        edge = torch.sigmoid(d)
        if self.light:
            return self.conv_norm((1 - edge) * i + p, "dfm.conv_p") + self.conv_norm(i + edge * p, "dfm.conv_i")
        return self.norm_conv(edge * p + (1 - edge) * i, "dfm.conv")

    def __call__(self, x):
        """Main, P and D."""
        x = F.relu(self.conv_norm(x, "conv1", 2))
        x = F.relu(self.norm(self.conv(x, "conv1.3", 2), "conv1.4"))
        x = F.relu(self.layer(F.relu(self.layer(x, "layer1")), "layer2", 2))
        p, d = self.layer(x, "layer3_"), self.block(x, "layer3_d", last_relu=False)
        x = F.relu(self.layer(x, "layer3", 2))
        p = for_p = self.pag(p, self.conv_norm(x, "compression3"), "pag3")
        d = d + self.resize(self.conv_norm(x, "diff3"), d)
        x = F.relu(self.layer(x, "layer4", 2))
        p = self.layer(F.relu(p, inplace=True), "layer4_")  # in place: the head of P reads what is left
        d = F.relu(d, inplace=True)
        d = self.layer(d, "layer4_d") if self.light else self.block(d, "layer4_d", last_relu=False)
        p = self.pag(p, self.conv_norm(x, "compression4"), "pag4")
        d = for_d = d + self.resize(self.conv_norm(x, "diff4"), d)
        p = self.layer(F.relu(p, inplace=True), "layer5_")
        d = self.layer(F.relu(d, inplace=True), "layer5_d")
        context = self.resize(self.pool(self.layer(x, "layer5", 2)), p)
        return [
            self.head(self.fuse(p, context, d), "final_layer"),
            self.head(for_p, "seghead_p"),
            self.head(for_d, "seghead_d"),
        ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("m", [2, 3], ids=["light", "large"])
def test_all_three_outputs_are_the_published_networks(m, dtype):
    torch.manual_seed(4)
    model, image = tiny(m).to(dtype), torch.randn(3, 3, 64, 96, dtype=dtype)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.3)
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    if dtype == torch.float64:
        close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        by_running = Published(model.eval(), statistics=True)(image)
        close(model(image), by_running[0])
        model.training = True  # the heads, while each layer keeps normalising by the running statistics
        close(model(image), by_running)
        by_batch = Published(model, statistics=False)(image)
        close(model.train()(image), by_batch)


def test_the_heads_hand_no_gradient_back_where_the_next_stage_reads_nothing():
    model, image = tiny(), torch.randn(2, 3, 32, 32)
    read = []
    hooks = [head.register_forward_pre_hook(lambda _, given: read.append(given[0]))
             for head in (model.seghead_p, model.seghead_d)]  # fmt: skip
    model(image)
    assert len(hooks) == len(read) == 2
    assert all((item >= 0).all() and (item == 0).any() for item in read)


def test_the_smallest_image_works():
    assert tiny().eval()(torch.randn(1, 3, 8, 8)).shape == (1, 3, 1, 1)
    assert tiny()(torch.randn(2, 3, 8, 8))[0].shape == (2, 3, 1, 1)


@pytest.mark.parametrize("size", [(65, 64), (100, 100), (8, 12)])
def test_a_size_that_does_not_fit_is_refused_with_the_cure(size):
    with pytest.raises(ValueError, match=rf"{size[0]} x {size[1]} .* multiples of 8 .*PIDNetWrapper"):
        tiny().eval()(torch.randn(1, 3, *size))


@pytest.mark.parametrize("size", [(64, 64), (65, 33), (8, 9), (5, 3)])
def test_the_wrapper_takes_any_size_and_gives_logits_as_large(size):
    torch.manual_seed(0)
    model = PIDNetWrapper("s", num_classes=3, in_channels=1).eval()
    with torch.no_grad():
        logits = model(torch.randn(1, 1, *size))
        assert logits.shape == (1, 3, *size)
        assert F.cross_entropy(logits, torch.zeros(1, *size, dtype=torch.long)).isfinite()


def test_the_wrapper_gives_all_three_in_training_main_first():
    model = PIDNetWrapper(variant="s", num_classes=3)
    with torch.no_grad():
        outputs = model(torch.randn(2, 3, 30, 50))
    assert [tuple(output.shape) for output in outputs] == [(2, 3, 30, 50), (2, 3, 30, 50), (2, 1, 30, 50)]


def test_without_deep_supervision_a_plain_loss_reaches_every_parameter():
    model = PIDNetWrapper(variant="s", num_classes=3, deep_supervision=False)
    label = torch.randint(0, 3, (2, 30, 50))
    F.cross_entropy(model(torch.randn(2, 3, 30, 50)), label).backward()
    assert [name for name, item in model.named_parameters() if item.grad is None] == []


def test_weights_of_the_network_are_the_wrappers():
    with torch.device("meta"):
        wrapper = PIDNetWrapper("L", num_classes=5)
    of_wrapper = {name: value.shape for name, value in wrapper.state_dict().items()}
    assert of_wrapper == {name: value.shape for name, value in published("l", num_classes=5).state_dict().items()}


def test_where_the_sides_fit_the_wrapper_is_the_network_enlarged():
    torch.manual_seed(0)
    model = PIDNetWrapper("s", num_classes=2).eval()
    image = torch.randn(1, 3, 32, 64)
    with torch.no_grad():
        small = PIDNet.forward(model, image)
        expected = F.interpolate(small, size=(32, 64), mode="bilinear", align_corners=True)
        torch.testing.assert_close(model(image), expected)


def test_one_image_cannot_be_trained_on_and_the_message_says_what_to_do():
    with pytest.raises(ValueError, match=r"one image.*batch_size.*drop_last: true"):
        tiny()(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("build", "parts"),
    [
        (lambda: PIDNetWrapper("x"), ["'x'", "s, m, l"]),
        (lambda: PIDNetWrapper(num_classes=0), ["num_classes is 0"]),
        (lambda: PIDNet(planes=0), ["planes is 0", "1 and more"]),
    ],
)
def test_a_wrong_argument_of_the_model_says_what_is_possible(build, parts):
    with torch.device("meta"), pytest.raises(ValueError) as error:
        build()
    assert [part for part in parts if part not in str(error.value)] == []


# The loss


def hard_pixels_mean(logits, label, threshold, min_kept, weights=None):
    """OHEM by its definition: sort the probabilities, take the threshold, average."""
    losses = F.cross_entropy(logits, label, weights, ignore_index=255, reduction="none")
    valid = label != 255
    true = label.where(valid, torch.tensor(0)).unsqueeze(1)
    probability = logits.softmax(1).gather(1, true)[:, 0][valid]
    ranked = probability.sort().values
    limit = max(float(ranked[min(min_kept, len(ranked) - 1)].detach()), threshold)
    return losses[valid][probability < limit].mean()


def some_pixels(confidence=4.0):
    """Logits and labels of which most pixels are easy, some hard, some ignored."""
    torch.manual_seed(3)
    label = torch.randint(0, 4, (2, 12, 10))
    logits = torch.randn(2, 4, 12, 10) + confidence * F.one_hot(label, 4).permute(0, 3, 1, 2)
    label[:, :3] = 255
    return logits.requires_grad_(), label


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("min_kept", [0, 5, 60, 178, 179, 180, 1000])
def test_hard_pixels_are_those_of_the_definition(min_kept, weighted):
    logits, label = some_pixels()  # 180 valid pixels
    weights = torch.tensor([0.5, 1.0, 2.0, 3.0]) if weighted else None
    found = ohem_cross_entropy(logits, label, 0.9, min_kept, class_weights=weights)
    torch.testing.assert_close(found, hard_pixels_mean(logits, label, 0.9, min_kept, weights))
    assert found.requires_grad


def test_a_fraction_is_of_all_pixels():
    logits, label = some_pixels(confidence=12.0)
    part = ohem_cross_entropy(logits, label, 0.5, 0.25)
    assert torch.equal(part, ohem_cross_entropy(logits, label, 0.5, 60))
    assert not torch.equal(part, ohem_cross_entropy(logits, label, 0.5, 0.5))


@pytest.mark.parametrize("case", ["nothing valid", "nothing hard"])
def test_of_an_empty_set_the_loss_is_0_and_so_is_its_gradient(case):
    logits, label = some_pixels()
    if case == "nothing valid":
        label[:] = 255
    found = ohem_cross_entropy(logits, label, threshold=0.0 if case == "nothing hard" else 0.9, min_kept=0)
    found.backward()
    assert found == 0
    assert not logits.grad.any()


def test_boundaries_weigh_as_much_as_all_other_pixels():
    logits = torch.zeros(1, 1, 4, 4)
    boundary = torch.zeros(1, 4, 4)
    boundary[0, 0, :2] = 1  # 2 of 16 pixels
    expected = (2 * 14 / 16 + 14 * 2 / 16) * torch.log(torch.tensor(2.0)) / 16
    torch.testing.assert_close(boundary_loss(logits, boundary), expected)
    assert boundary_loss(logits, torch.zeros(1, 1, 4, 4)) == 0  # without a boundary nothing is rare
    boundary[0, 3] = 255  # neither: no weight, but a pixel of the mean
    expected = (2 * 10 / 12 + 10 * 2 / 12) * torch.log(torch.tensor(2.0)) / 16
    torch.testing.assert_close(boundary_loss(logits, boundary), expected)


def outputs_and_target(large=False):
    torch.manual_seed(5)
    size = (16, 24) if large else (2, 3)
    outputs = [torch.randn(2, channels, *size, requires_grad=True) for channels in (4, 4, 1)]
    label = torch.randint(0, 4, (2, 16, 24))
    label[:, :2] = 255
    return outputs, (label, boundary_target(label))


def test_the_loss_is_the_weighted_sum_of_its_definition():
    (main, detail, edges), (label, boundary) = outputs_and_target()
    settings = dict(weights=[0.3, 2.0, 7.0, 0.5], ohem={"threshold": 0.7, "min_kept": 100}, boundary_threshold=0.6)
    up = [F.interpolate(x, size=(16, 24), mode="bilinear", align_corners=True) for x in (main, detail, edges)]
    near = torch.where(up[2][:, 0].sigmoid() > 0.6, label, 255)
    terms = {
        "detail": 0.3 * F.cross_entropy(up[1], label, ignore_index=255),
        "main": 2.0 * hard_pixels_mean(up[0], label, 0.7, 100),
        "boundary": 7.0 * boundary_loss(up[2], boundary),
        "aware": 0.5 * hard_pixels_mean(up[0], near, 0.7, 100),
    }
    found = PIDNetLoss(**settings, terms=True)([main, detail, edges], (label, boundary))
    assert list(found) == list(terms)
    for name, value in terms.items():
        torch.testing.assert_close(found[name], value, msg=name)
    together = PIDNetLoss(**settings)([main, detail, edges], [label.unsqueeze(1), boundary.unsqueeze(1)])
    torch.testing.assert_close(together, sum(terms.values()))


def test_class_weights_are_torchs_in_the_detail_term():
    outputs, (label, boundary) = outputs_and_target(large=True)
    weights = [0.5, 1.0, 2.0, 3.0]
    found = PIDNetLoss(weights=[1, 0, 0, 0], class_weights=weights)(outputs, (label, boundary))
    torch.testing.assert_close(found, F.cross_entropy(outputs[1], label, torch.tensor(weights), ignore_index=255))


def test_a_batch_without_a_valid_pixel_or_boundary_costs_nothing_and_breaks_nothing():
    outputs, (label, _) = outputs_and_target()
    label = torch.full_like(label, 255)
    for class_weights in (None, [1.0, 1.0, 1.0, 1.0]):
        loss = PIDNetLoss(class_weights=class_weights)(outputs, (label, boundary_target(label)))
        assert loss == 0
        loss.backward()
        assert all(output.grad.isfinite().all() for output in outputs)


def test_in_evaluation_the_loss_is_the_main_term():
    outputs, target = outputs_and_target()
    found = PIDNetLoss(terms=True)(outputs, target)["main"]
    assert PIDNetLoss()(outputs[0], target) == found
    assert PIDNetLoss()(outputs[0], target[0]) == found  # the label alone will do


def test_settings_may_be_those_of_a_config():
    config = ConfigDict({"ohem": {"threshold": 0.7, "min_kept": 0.0625}, "weights": [1, 1, 1, 1]})
    loss = PIDNetLoss(weights=config.weights, ohem=config.ohem)
    assert (loss.threshold, loss.min_kept) == (0.7, 0.0625)


def test_bfloat16_outputs_are_taken():
    outputs, target = outputs_and_target()
    exact = PIDNetLoss()(outputs, target)
    half = PIDNetLoss()([output.bfloat16() for output in outputs], target)
    assert half.item() == pytest.approx(exact.item(), rel=0.03)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_loss_is_computed_in_float32_at_least(dtype):
    outputs, target = outputs_and_target(large=True)
    weights = dict(class_weights=[0.5, 1.0, 2.0, 3.0])
    given = [output.detach().to(dtype) for output in outputs]
    found = PIDNetLoss(**weights)(given, target)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = PIDNetLoss(**weights)([output.float() for output in given], target)
    torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (dict(weights=[1, 2, 3]), ["3 weights", "expected 4", "detail, main, boundary, aware"]),
        (dict(ohem={"treshold": 0.9}), ["treshold", "threshold, min_kept"]),
        (dict(ohem={"threshold": 1.5}), ["threshold is 1.5"]),
        (dict(ohem={"min_kept": -1}), ["min_kept is -1"]),
        (dict(ohem={"min_kept": 1.5}), ["min_kept is 1.5", "fraction"]),
        (dict(boundary_threshold=80), ["boundary_threshold is 80", "0 to 1"]),
    ],
)
def test_a_wrong_setting_of_the_loss_says_what_is_possible(arguments, parts):
    with pytest.raises(ValueError) as error:
        PIDNetLoss(**arguments)
    assert [part for part in parts if part not in str(error.value)] == []


def test_what_does_not_fit_the_loss_is_named():
    outputs, (label, boundary) = outputs_and_target()
    loss = PIDNetLoss()
    with pytest.raises(ValueError, match="2 outputs; expected main, P and D"):
        loss(outputs[:2], (label, boundary))
    with pytest.raises(ValueError, match=r"no boundary; .*PIDNetDatasetWrapper"):
        loss(outputs, label)
    with pytest.raises(ValueError, match=r"\(2, 24, 16\)"):
        loss(outputs, (label, boundary.transpose(1, 2)))
    with pytest.raises(ValueError, match=r"float32.*integers"):
        loss(outputs, (label.float(), boundary))


def test_model_and_loss_learn_together_and_reach_every_parameter():
    torch.manual_seed(0)
    model = tiny()
    label = torch.zeros(4, 32, 32, dtype=torch.long)
    label[:, 8:20, 12:24], label[:, 24:] = 1, 2
    # With channels last and fewer than 16 of them, oneDNN 3.12 writes past its memory in the backward pass of a strided
    # 1 x 1 convolution (oneDNN issue 6035). The published models are wider.
    image = F.one_hot(label, 3).permute(0, 3, 1, 2).contiguous() + 0.3 * torch.randn(4, 3, 32, 32)
    loss = PIDNetLoss(ohem={"min_kept": 0.0625})
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    values = []
    for _ in range(12):
        value = loss(model(image), (label, boundary_target(label)))
        optimizer.zero_grad()
        value.backward()
        if not values:
            missing = [name for name, item in model.named_parameters() if item.grad is None]
        optimizer.step()
        values.append(float(value.detach()))
    assert missing == []  # DistributedDataParallel would wait for them
    assert values[-1] < 0.8 * values[0]


# The dataset


def test_a_step_gives_a_band_of_four_pixels_around_it():
    label = torch.zeros(24, 32, dtype=torch.long)
    label[:, 16:] = 1
    expected = torch.zeros(24, 32)
    expected[:, 14:18] = 1
    assert torch.equal(boundary_target(label), expected)
    assert torch.equal(boundary_target(label.T), expected.T)


@pytest.mark.parametrize(("width", "columns"), [(1, [15]), (2, [15, 16]), (3, [14, 15, 16]), (5, [13, 14, 15, 16, 17])])
def test_the_width_of_a_boundary(width, columns):
    label = torch.zeros(8, 32, dtype=torch.long)
    label[:, 16:] = 1
    assert boundary_target(label, width)[0].nonzero().flatten().tolist() == columns


def test_no_boundary_begins_in_the_margin():
    label = torch.zeros(20, 20, dtype=torch.long)
    label[:, 10:], label[2:] = 1, 2
    found = boundary_target(label, margin=4)
    assert not found.any()  # the lower region begins in row 1, and below it everything is one class
    label[:, 10:] = 1
    assert boundary_target(label, margin=4)[:, 9].nonzero().flatten().tolist() == list(range(3, 18))
    assert not boundary_target(label, margin=10).any()


def test_the_border_of_ignored_pixels_counts_and_small_integers_do_not_wrap():
    label = torch.zeros(8, 8, dtype=torch.uint8)
    label[:, 4:] = 255
    assert boundary_target(label)[0].tolist() == [0, 0, 1, 1, 1, 1, 0, 0]


def test_a_batch_of_labels_is_its_labels_one_by_one():
    torch.manual_seed(0)
    labels = torch.randint(0, 2, (3, 16, 16)).repeat_interleave(4, 1)
    assert torch.equal(boundary_target(labels), torch.stack([boundary_target(label) for label in labels]))


def test_items_get_their_boundary_beside_the_label():
    images, labels = torch.randn(3, 1, 16, 24), torch.randint(0, 3, (3, 1, 16, 24), dtype=torch.int32)
    data = PIDNetDatasetWrapper(TensorDataset(images, labels), boundary=ConfigDict({"width": 2}))
    assert len(data) == 3
    image, (label, boundary) = data[1]
    assert torch.equal(image, images[1])
    assert torch.equal(label, labels[1, 0].long())
    assert torch.equal(boundary, boundary_target(labels[1, 0], 2))
    batch_image, (batch_label, batch_boundary) = next(iter(DataLoader(data, batch_size=3)))
    assert (batch_image.shape, batch_label.shape, batch_boundary.shape) == (
        (3, 1, 16, 24),
        (3, 16, 24),
        (3, 16, 24),
    )
    assert (batch_label.dtype, batch_boundary.dtype) == (torch.int64, torch.float32)


def test_numpy_arrays_are_taken():
    source = [(torch.zeros(3, 8, 8).numpy(), torch.ones(8, 8, dtype=torch.uint8).numpy())]
    image, (label, boundary) = PIDNetDatasetWrapper(source)[0]
    assert (image.shape, label.dtype, boundary.sum()) == ((3, 8, 8), torch.int64, 0)


def test_whether_items_are_random_is_the_sources_word():
    class Still(TensorDataset):
        random = False

    assert PIDNetDatasetWrapper(Still(torch.zeros(1))).random is False
    assert PIDNetDatasetWrapper(TensorDataset(torch.zeros(1))).random is True


def test_what_is_no_image_with_a_label_is_named():
    with pytest.raises(TypeError, match="an item of list is 3 parts"):
        PIDNetDatasetWrapper([(1, 2, 3)])[0]
    with pytest.raises(TypeError, match="an item of list is a dict"):
        PIDNetDatasetWrapper([{"image": 1}])[0]
    with pytest.raises(TypeError, match=r"shape \(2, 8, 8\)"):
        PIDNetDatasetWrapper([(torch.zeros(3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.long))])[0]
    with pytest.raises(TypeError, match="float32"):
        PIDNetDatasetWrapper([(torch.zeros(3, 8, 8), torch.zeros(8, 8))])[0]


@pytest.mark.parametrize(
    ("boundary", "parts"),
    [
        ({"wide": 4}, ["wide", "width, margin"]),
        ({"width": 0}, ["width is 0", "1 and more"]),
        ({"width": 2.5}, ["width is 2.5", "whole"]),
        ({"margin": -1}, ["margin is -1", "0 and more"]),
    ],
)
def test_a_wrong_setting_of_the_boundary_says_what_is_possible(boundary, parts):
    with pytest.raises(ValueError) as error:
        PIDNetDatasetWrapper([], boundary)
    assert [part for part in parts if part not in str(error.value)] == []
