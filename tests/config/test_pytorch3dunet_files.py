"""pytorch-3dunet's and PIDNet's files: configs mean here what they mean there, or are refused; checkpoints load."""

# ruff: noqa: E501 - a case of a table is one line, so that message and cause stand together

from __future__ import annotations

import contextlib
import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import RunCli

from dtrain.checkpoint.checkpoint_folder import Checkpoints
from dtrain.checkpoint.contents import CheckpointError
from dtrain.checkpoint.weights import fitted, load_for_use, load_weights, misfits_of
from dtrain.components.models.pidnet import PIDNet
from dtrain.components.models.unet import ResidualUNet2D, ResidualUNet3D, ResidualUNetSE3D, UNet2D, UNet3D
from dtrain.components.models.vit import ViT
from dtrain.config.check import check
from dtrain.config.errors import ConfigError, to_plain
from dtrain.config.load import from_mapping, load_config, notes_on, place_of, to_yaml
from dtrain.dataloader import get_train_loaders
from dtrain.distributed.ranks import Ranks
from dtrain.loss import get_loss_criterion
from dtrain.metrics import get_evaluation_metric
from dtrain.modelloader import get_model

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


def test_a_prediction_takes_such_a_file_too(tmp_path: Path) -> None:
    model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    torch.save({f"model.{name}": value for name, value in model.state_dict().items()}, tmp_path / "weights.pt")
    ranks = Ranks(0, 0, 1, torch.device("cpu"))
    load_for_use(other, ranks, Checkpoints(tmp_path), tmp_path / "weights.pt")
    assert torch.equal(other.weight, model.weight)


def test_a_model_with_a_part_named_model_keeps_its_names() -> None:
    model = torch.nn.ModuleDict({"model": torch.nn.Linear(2, 2)})
    assert fitted(model, model.state_dict()).keys() == {"model.weight", "model.bias"}


def test_weights_of_another_model_are_told_by_the_names_of_the_file() -> None:
    own, other = torch.nn.Linear(2, 2), {"model.a": torch.zeros(1), "loss.b": torch.zeros(1)}
    assert fitted(own, other) is other
    assert any("model.a" in line for line in misfits_of(own, fitted(own, other)))


def test_a_state_dict_of_vit_pytorch_loads(published_vit: type, tmp_path: Path) -> None:
    torch.manual_seed(0)
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


# -------------------------------------------------------------------------------------------- what is translated how


DATA = Path(__file__).parents[1] / "data" / "pytorch3dunet"
SMALL = """\
model: {name: UNet3D, in_channels: 1, out_channels: 1, final_sigmoid: true}
trainer: {checkpoint_dir: c, max_num_epochs: 2, max_num_iterations: 10}
optimizer: {}
loss: {name: BCEDiceLoss}
eval_metric: {name: MeanIoU}
lr_scheduler: {name: StepLR, step_size: 3}
loaders:
  train:
    file_paths: [a.h5]
    slice_builder: {name: SliceBuilder, patch_shape: [8, 8, 8], stride_shape: [8, 8, 8]}
    transformer:
      raw: [{name: Standardize}, {name: RandomFlip}, {name: ToTensor, expand_dims: true}]
      label: [{name: RandomFlip}, {name: ToTensor, expand_dims: true}]
"""


def read(tmp_path: Path, changes: list[str] | None = None, text: str = SMALL) -> Any:
    """The small file with some overrides, as load_config gives it."""
    (tmp_path / "train.yml").write_text(text)
    return load_config(tmp_path / "train.yml", changes or [])


def told(tmp_path: Path, old: str, new: str) -> list[str]:
    """The mistakes of the small file with a change in its text, without the folder's name."""
    assert SMALL.count(old) == 1
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text=SMALL.replace(old, new))
    return [str(mistake).replace(f"{tmp_path}/", "") for mistake in caught.value.mistakes]


def test_what_the_file_leaves_out_is_filled_in_as_pytorch3dunet_does(tmp_path: Path) -> None:
    config = read(tmp_path)
    assert config.loaders.name == "StandardHDF5Dataset"
    assert config.loaders.num_workers == 1
    assert to_plain(config.optimizer) == {"name": "Adam", "lr": 1e-3}
    assert config.lr_scheduler.interval == "validation"
    assert config.trainer.validate_every_steps == 200
    assert config.trainer.log_every_steps == 100
    assert config.trainer.mode == "max"
    note = notes_on(config)[0]
    assert note.startswith(
        "pytorch-3dunet's defaults, where the file sets nothing: loaders.name: 'StandardHDF5Dataset'"
    )
    assert "optimizer.lr: 0.001" in note and "trainer.mode: 'max'" in note


def test_each_of_several_validation_sets_has_its_transformer(tmp_path: Path) -> None:
    val = """
  val:
    - label: near
      file_paths: [b.h5]
      transformer: {raw: [{name: Standardize}], label: [{name: ToTensor, expand_dims: true}]}
    - {label: far, file_paths: [c.h5], transformer: {label: []}}
"""
    sets = read(tmp_path, text=SMALL.rstrip() + val.replace("{label: []}", "{raw: [{name: Normalize}]}")).loaders.val
    assert ["transformer" in each for each in sets] == [False, False]
    assert [each.transforms.raw[0].name for each in sets] == ["Standardize", "Normalize"]
    assert sets[0].transforms.label[0].name == "ToTensor" and sets[1].transforms.label is None
    with pytest.raises(ConfigError, match=r"loaders.val.1.transformer: has no list 'raw' for the image"):
        read(tmp_path, text=SMALL.rstrip() + val)


def test_what_the_file_says_stays(tmp_path: Path) -> None:
    changes = [
        "optimizer.name=SGD",
        "optimizer.learning_rate=0.1",
        "trainer.validate_after_iters=7",
        "loaders.num_workers=0",
    ]
    config = read(tmp_path, [*changes, "trainer.eval_score_higher_is_better=false", "lr_scheduler.interval=epoch"])
    assert to_plain(config.optimizer) == {"name": "SGD", "lr": 0.1}
    assert (config.trainer.validate_every_steps, config.trainer.mode, config.loaders.num_workers) == (7, "min", 0)
    assert config.lr_scheduler.interval == "epoch"


def test_the_weight_decay_of_adamw_is_0_unless_said(tmp_path: Path) -> None:
    assert read(tmp_path, ["optimizer.name=AdamW"]).optimizer.weight_decay == 0
    assert read(tmp_path, ["optimizer={name: AdamW, weight_decay: 0.1}"]).optimizer.weight_decay == 0.1


def test_a_file_without_a_transformer_is_none_of_pytorch3dunets(tmp_path: Path) -> None:
    config = read(tmp_path, ["loaders.train={file_paths: [a.h5]}"])
    assert "interval" not in config.lr_scheduler and "name" not in config.optimizer and notes_on(config) == []


def test_a_dataset_of_ones_own_keeps_its_transformer(tmp_path: Path) -> None:
    config = read(tmp_path, ["loaders.dataset=my.package:Volumes"])
    assert len(config.loaders.train.transformer.raw) == 3 and "interval" not in config.lr_scheduler


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("{name: MSELoss, ignore_index: null}", {"name": "MSELoss"}),
        ("{name: MSELoss, skip_last_target: false}", {"name": "MSELoss"}),
        ("{name: MSELoss, ignore_index: -1}", {"name": "MaskedLoss", "loss": {"name": "MSELoss"}, "ignore_index": -1}),
        ("{name: L1Loss, skip_last_target: true}", {"name": "MaskedLoss", "loss": {"name": "L1Loss"}, "skip_last_target": True}),
        ("{name: CrossEntropyLoss, ignore_index: null}", {"name": "CrossEntropyLoss"}),
        ("{name: CrossEntropyLoss, ignore_index: 0}", {"name": "CrossEntropyLoss", "ignore_index": 0}),
        (
            "{name: CrossEntropyLoss, weight: [1, 2], ignore_index: 0, skip_last_target: true, squeeze_channel: true}",
            {"name": "MaskedLoss", "loss": {"name": "CrossEntropyLoss", "weight": [1, 2], "ignore_index": 0},
             "skip_last_target": True, "squeeze_channel": True},
        ),
        ("{name: BCEWithLogitsLoss, pos_weight: 3.0}", {"name": "BCEWithLogitsLoss", "pos_weight": [3.0]}),
        ("{name: BCEWithLogitsLoss, pos_weight: [3]}", {"name": "BCEWithLogitsLoss", "pos_weight": [3]}),
        ("{name: BCEDiceLoss, alpha: 2.0, skip_last_target: true}", {"name": "BCEDiceLoss", "alpha": 2.0, "skip_last_target": True}),
        ("{name: DiceLoss, normalization: softmax, ignore_index: null}", {"name": "DiceLoss", "normalization": "softmax"}),
        ("3", 3),
    ],
)  # fmt: skip
def test_a_loss_means(loss: str, expected: Any, tmp_path: Path) -> None:
    assert to_plain(read(tmp_path, [f"loss={loss}"]).loss) == expected


def test_a_wrapped_loss_keeps_its_places(tmp_path: Path) -> None:
    text = SMALL.replace("{name: BCEDiceLoss}", "{name: MSELoss, ignore_index: -1}")
    config = read(tmp_path, text=text)
    where = f"{tmp_path}/train.yml:4:"
    assert str(place_of(config, ("loss", "loss", "name"))) == f"{where}8"
    assert str(place_of(config, ("loss", "ignore_index"))) == f"{where}23"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([], {"name": "dtrain.components.metrics.pytorch3dunet.MeanIoU", "activation": "sigmoid"}),
        (["model.final_sigmoid=false", "eval_metric={name: DiceCoefficient}"], {"name": "DiceCoefficient", "activation": "softmax", "absent": "zero"}),
        (["loss.name=CrossEntropyLoss", "eval_metric={name: DiceCoefficient, ignore_index: null}"], {"name": "DiceCoefficient", "activation": "softmax", "absent": "zero"}),
        (["model.is_segmentation=false", "eval_metric={name: PSNR}"], {"name": "PSNR", "activation": "none"}),
        (
            ["eval_metric={name: BlobsAveragePrecision, metric: acc, thresholds: [0.5]}"],
            {"BlobsAveragePrecision": {"name": "BoundaryAveragePrecision", "invert_pmaps": False, "input_channel": 0,
             "thresholds": [0.5], "iou_thresholds": [0.5], "activation": "sigmoid"}},
        ),
        (["eval_metric={names: [DSC, PPV], multiple: true}"], {"name": ["DSC", "PPV"]}),
        (["eval_metric={name: my.package:Score, x: 3}"], {"name": "my.package:Score", "x": 3}),
    ],
)  # fmt: skip
def test_a_metric_means(changes: list[str], expected: Any, tmp_path: Path) -> None:
    assert to_plain(read(tmp_path, changes).metrics) == expected


@pytest.mark.parametrize("final_sigmoid", [True, False])
def test_the_metric_of_a_moved_file_gives_the_packages_figure(final_sigmoid: bool, tmp_path: Path) -> None:
    theirs = pytest.importorskip("pytorch3dunet.unet3d.metrics").MeanIoU()
    ranks = Ranks(0, 0, 1, torch.device("cpu"))
    changes = [f"model.final_sigmoid={final_sigmoid}", "model.out_channels=3"]
    metrics = get_evaluation_metric(read(tmp_path, changes), ranks, ranks.device)
    torch.manual_seed(0)
    output, label = torch.randn(2, 3, 4, 5, 6), torch.randint(0, 3, (2, 4, 5, 6))
    label[0].clamp_(max=1)
    p = output.sigmoid() if final_sigmoid else output.softmax(1)
    for target in (label, torch.stack([(label == number).float() for number in range(3)], 1)):
        metrics.reset()
        metrics.update(output, target, 0)
        assert metrics.compute() == {"MeanIoU": pytest.approx(float(theirs(p, target)), rel=1e-6)}


def test_what_has_no_effect_is_said_in_one_line_each(tmp_path: Path) -> None:
    changes = [
        "trainer.max_val_images=3",
        "trainer.skip_train_validation=true",
        "trainer.tensorboard_formatter={log_channelwise: true}",
    ]
    config = read(tmp_path, changes)
    for key in ("max_val_images", "skip_train_validation", "tensorboard_formatter"):
        assert key not in config.trainer
        assert [note for note in notes_on(config) if note.startswith(f"trainer.{key}: has no effect: ")]


def test_null_where_pytorch3dunet_means_none(tmp_path: Path) -> None:
    keys = ("resume", "pre_trained", "validate_iters", "max_val_images", "skip_train_validation")
    config = read(tmp_path, [f"trainer.{key}=null" for key in keys])
    assert "resume" not in config.trainer and "validate_iters" not in config.trainer
    assert not any("has no effect" in note for note in notes_on(config))


LABEL = "label: [{name: RandomFlip}, {name: ToTensor, expand_dims: true}]"
WEIGHTS = LABEL + "\n      weight: [{name: RandomFlip}, {name: ToTensor, expand_dims: false}]"


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("{name: MeanIoU}", "{name: MeanIoU, use_first_input: true}", "metrics.use_first_input"),
        ("{name: MeanIoU}", "{name: BoundaryAdaptedRandError, threshold: 0.4, use_last_target: true}", "metrics.threshold"),
        ("{name: MeanIoU}", "{name: BlobsAveragePrecision, use_last_target: true}", "metrics.use_last_target"),
        ("{name: MeanIoU}", "{name: BoundaryAveragePrecision, metric: ap}", "metrics.metric"),
        ("{name: MeanIoU}", "{name: AdaptedRandError, save_plots: true}", "metrics.save_plots"),
        ("{name: MeanIoU}", "{name: PSNR, ignore_index: 3}", "metrics.ignore_index"),
        ("{name: BCEDiceLoss}", "{name: BCEDiceLoss, alpha: 1, beta: 2}", "loss.beta"),
        ("  train:", "  mirror_padding: [16, 32, 32]\n  train:", "loaders.mirror_padding"),
        ("  train:", "  weight_internal_path: /weight\n  train:", "loaders.weight_internal_path"),
        (LABEL, WEIGHTS, "loaders.train.transformer.weight"),
    ],
)  # fmt: skip
def test_what_pytorch3dunet_reads_past_is_noted_and_the_file_is_right(
    old: str, new: str, key: str, tmp_path: Path
) -> None:
    assert SMALL.count(old) == 1
    config = read(tmp_path, text=SMALL.replace(old, new))
    check(config, None)
    assert [note for note in notes_on(config) if note.startswith(f"{key}: has no effect: ")]
    without = to_plain(read(tmp_path, text=SMALL.replace(old, new)))
    *parents, last = key.split(".")
    for name in parents:
        without = without.get(name, {})
    assert last not in without


@pytest.mark.parametrize("dataset", ["StandardHDF5Dataset", "LazyHDF5Dataset", "DSB2018Dataset"])
def test_null_weights_are_none_and_those_of_ones_own_loss_are_read(dataset: str, tmp_path: Path) -> None:
    changes = [
        f"loaders.dataset={dataset}",
        "loaders.weight_internal_path=null",
        "loaders.train.weight_internal_path=null",
    ]
    config = read(tmp_path, [*changes, "model.num_groups=null"])
    assert "weight_internal_path" not in config.loaders and "weight_internal_path" not in config.loaders.train
    assert "num_groups" not in config.model
    assert not any("weight" in note for note in notes_on(config))
    own = read(tmp_path, ["loss.name=my.package:Loss", "loaders.weight_internal_path=w"], SMALL.replace(LABEL, WEIGHTS))
    assert own.loaders.weight_internal_path == "w" and not any("weight" in note for note in notes_on(own))


def test_older_names_of_the_limits_are_known(tmp_path: Path) -> None:
    config = read(tmp_path, text=SMALL.replace("max_num_epochs: 2, max_num_iterations", "epochs: 2, iters"))
    assert (config.trainer.max_epochs, config.trainer.max_steps) == (2, 10)
    (line,) = told(tmp_path, "max_num_epochs: 2", "max_num_epochs: 2, epochs: 3")
    assert line.startswith("train.yml:2:49: 'trainer.epochs' and 'trainer.max_epochs' are two names for one setting")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("max_num_epochs: 2", "resume: x/last_checkpoint.pytorch", "train.yml:2:30: trainer.resume: a checkpoint of pytorch-3dunet lacks"),
        ("max_num_epochs: 2", "validate_iters: 5", "train.yml:2:30: trainer.validate_iters: a validation always covers all of loaders.val"),
        ("{name: BCEDiceLoss}", "{name: BCEWithLogitsLoss, weight: [1, 2]}", "train.yml:4:33: loss.weight: pytorch-3dunet does not use it"),
        ("{name: BCEDiceLoss}", "{name: BCEWithLogitsLoss, pos_weight: [1, 2]}", "train.yml:4:33: loss.pos_weight: torch applies 2 weights along the last axis"),
        ("{name: MeanIoU}", "{name: BlobsAveragePrecision, metric: iou}", "train.yml:5:44: metrics.metric: 'iou' is not a metric of instances; possible: ap, acc"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(old: str, new: str, expected: str, tmp_path: Path) -> None:
    (line,) = told(tmp_path, old, new)
    assert line.startswith(expected), line


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("raw: [{name: Standardize}", "Raw: [{name: Standardize}", ["train.yml:12:7: loaders.train.transformer.Raw: possible: raw, label, weight", "train.yml:11:5: loaders.train.transformer: has no list 'raw' for the image"]),
        ("trainer:", "model_path: a.pt\npredictor: 3\ntrainer:", ["train.yml:2:1: model_path: stands for 'predictor.checkpoint', but 'predictor' is not a mapping"]),
        ("trainer:", "model_path: a.pt\npredictor: {checkpoint: b.pt}\ntrainer:", ["train.yml:2:1: 'model_path' and 'predictor.checkpoint' are two names for one setting; keep one of them"]),
    ],
)  # fmt: skip
def test_what_has_the_wrong_form_is_told(old: str, new: str, expected: list[str], tmp_path: Path) -> None:
    assert told(tmp_path, old, new) == expected


def test_all_mistakes_are_told_together(tmp_path: Path) -> None:
    text = SMALL.replace("{name: BCEDiceLoss}", "{name: BCEWithLogitsLoss, weight: [1]}")
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, ["trainer.validate_iters=3", "trainer.resume=a.pytorch"], text)
    assert len(caught.value.mistakes) == 3


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([], {"activation": "sigmoid", "format": "hdf5", "instances": "foreground", "connectivity": 2, "output_dataset": "segmentation"}),
        (["predictor.save_segmentation=false"], {"activation": "sigmoid", "format": "hdf5"}),
        (["predictor.save_segmentation=maybe"], {"activation": "sigmoid", "format": "hdf5", "save_segmentation": "maybe"}),
        (["predictor.name=LazyPredictor", "model.final_sigmoid=false"], {"activation": "softmax", "name": "LazyPredictor"}),
        (["predictor=null", "model.is_segmentation=false"], {"activation": "none"}),
        (["predictor.name=null", "predictor.prediction_channel=null"], {"activation": "sigmoid"}),
    ],
)  # fmt: skip
def test_a_predictor_means(changes: list[str], expected: dict[str, Any]) -> None:
    config = load_config(DATA / "dsb2018_test.yml", changes)
    assert to_plain(config.predictor) == expected | {
        "checkpoint": "PATH_TO_CHECKPOINT",
        "output_dir": "PATH_TO_OUTPUT_DIR",
    }
    assert "model_path" not in config and "test" not in config.loaders and "output_dir" not in config.loaders


def test_what_is_predicted_has_no_label() -> None:
    phase = load_config(
        DATA / "multiclass_test.yml", ["loaders.test.transformer.label=[{name: ToTensor}]"]
    ).loaders.predict
    assert phase.label_internal_path is None and phase.weight_internal_path is None
    assert phase.transforms.label is None and len(phase.transforms.raw) == 2


def test_a_mapping_made_in_python_is_translated_too() -> None:
    config = from_mapping(yaml.safe_load((DATA / "multiclass_train.yml").read_text()))
    assert config.lr_scheduler.interval == "validation" and "transformer" not in config.loaders.train


def test_strange_values_are_refused_or_kept_and_nothing_breaks() -> None:
    strange = [None, True, 0, -1.5, "x", "", [], [None], [[1]], {}, {"name": None}, {"name": ["x"]}, [{"name": 3}]]
    for file in ("ovules_train.yml", "dsb2018_test.yml"):
        text = yaml.safe_load((DATA / file).read_text())
        for number, path in enumerate(sections(text)[1:]):
            for value in strange[number % 5 :: 5]:
                values = copy.deepcopy(text)
                parent = values
                for key in path[:-1]:
                    parent = parent[key]
                parent[path[-1]] = copy.deepcopy(value)
                with contextlib.suppress(ConfigError):
                    from_mapping(values)


def sections(values: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values of a tree."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [path, *(found for key, item in items for found in sections(item, (*path, key)))]


# ------------------------------------------------------------------------------------------- whole files, whole runs


TINY = {  # what makes the published sizes small enough for a test
    "boundary": ["model.f_maps=[4, 8]", "model.num_groups=2"],
    "ovules": ["model.f_maps=[4, 8]", "model.num_groups=2"],
    "multiclass": ["model.f_maps=[4, 8]", "model.num_groups=2"],
    "dsb2018": ["model.f_maps=[4, 8]"],
}
CROPS = [
    f"loaders.{phase}.transformer.{part}.0.size=[32, 32]" for phase in ("train", "val") for part in ("raw", "label")
]


def volumes(folder: Path, seed: int, classes: int = 0) -> Path:
    """A folder with one HDF5 file of cells with bright walls; their numbers, or a few classes, are the label."""
    import h5py

    rng, shape = np.random.default_rng(seed), (10, 36, 36)
    middles = rng.random((12, 3)) * shape
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    distances = np.sqrt((((places[..., None, :] - middles) * (2, 1, 1)) ** 2).sum(-1))
    nearest = np.sort(distances, -1)
    wall = np.exp(-(((nearest[..., 1] - nearest[..., 0]) / 2) ** 2))
    label = distances.argmin(-1) + 1
    folder.mkdir()
    with h5py.File(folder / "cells.h5", "w") as file:
        file["raw"] = (wall * 200 + rng.random(shape) * 50).astype(np.uint8)
        file["label"] = (label % classes if classes else label).astype(np.uint16)
    return folder


def nuclei(folder: Path, seed: int) -> Path:
    """A folder with images of discs, and their masks."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:40, :44]
    for number in range(3):
        mask = np.zeros(y.shape, np.uint8)
        for row, column, radius in rng.integers((4, 4, 3), (36, 40, 7), (4, 3)):
            mask[(y - row) ** 2 + (x - column) ** 2 < radius**2] = 255
        image = (mask // 2 + rng.integers(0, 60, mask.shape)).astype(np.uint8)
        for name, values in (("images", image), ("masks", mask)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(folder / name / f"{number}.png")
    return folder


def overrides(kind: str, phases: tuple[str, ...], folder: Path) -> list[str]:
    """Paths of data that are made here, and small sizes."""
    changes = [*TINY[kind], "loaders.num_workers=0"]
    for seed, phase in enumerate(phases):
        make = nuclei if kind == "dsb2018" else volumes
        more = {"classes": 3} if kind == "multiclass" else {}
        changes.append(f"loaders.{phase}.file_paths=[{make(folder / phase, seed, **more)}]")
        if kind != "dsb2018":
            changes.append(f"loaders.{phase}.slice_builder.patch_shape=[8, 24, 24]")
            changes.append(f"loaders.{phase}.slice_builder.stride_shape=[8, 24, 24]")
            if phase == "test":
                changes.append(f"loaders.{phase}.slice_builder.halo_shape=[2, 4, 4]")
    return changes + (CROPS if kind == "dsb2018" and "train" in phases else [])


@pytest.mark.parametrize("file", sorted(DATA.glob("*.yml")), ids=lambda file: file.stem)
def test_a_published_file_is_right_as_it_is(file: Path) -> None:
    check(load_config(file), None)


@pytest.mark.parametrize("file", sorted(DATA.glob("*.yml")), ids=lambda file: file.stem)
def test_what_a_file_became_says_the_same_again(file: Path, tmp_path: Path) -> None:
    config = load_config(file)
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    again = load_config(tmp_path / "again.yaml")
    assert to_plain(again) == to_plain(config) and notes_on(again) == []


@pytest.mark.parametrize("kind", TINY)
def test_every_phase_of_a_published_file_can_be_built_and_tried(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(DATA / f"{kind}_train.yml", overrides(kind, ("train", "val"), tmp_path))
    check(config)
    model, loss = get_model(config), get_loss_criterion(config)
    loaders = get_train_loaders(config, 0, 1, config.seed)
    assert loaders.train is not None and loaders.val is not None
    for image, target in (next(iter(loaders.train.epoch(0))).batch, next(iter(loaders.val))):
        total, _ = loss(model(image), target)
        total.backward()
        assert torch.isfinite(total)


def test_the_label_is_what_pytorch3dunet_makes_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pytorch3dunet.datasets.utils import get_train_loaders as theirs

    text = yaml.safe_load((DATA / "boundary_train.yml").read_text())
    changes = overrides("boundary", ("train", "val"), tmp_path)
    config = load_config(DATA / "boundary_train.yml", [*changes, "loaders.global_normalization=false"])
    loaders = get_train_loaders(config, 0, 1, 0)
    for phase in ("train", "val"):
        text["loaders"][phase]["file_paths"] = [str(tmp_path / phase)]
        text["loaders"][phase]["slice_builder"] |= {
            "patch_shape": [8, 24, 24],
            "stride_shape": [8, 24, 24],
            "skip_shape_check": True,
        }
    text["loaders"] |= {"global_normalization": False, "num_workers": 0}
    expected = list(theirs(text)["val"])
    found = list(loaders.val or ())
    assert len(found) == len(expected) > 1
    for (image, target), (their_image, their_target) in zip(found, expected, strict=True):
        torch.testing.assert_close(image, their_image, rtol=1e-5, atol=1e-5)
        assert torch.equal(target.float(), their_target.float())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["loaders.train.transformer.raw.2={name: RandomFlop}"], "loaders.train.transforms.raw.2: "),
        (["loaders.val.transformer.label.1={name: ToTensor}"], "loaders.val.transforms.label.1: "),
        (["loaders.train.transformer.label.0={name: RandomFlip, axis_prob: 0.9}"], "loaders.train.transforms.raw.1: "),
    ],
)
def test_a_mistake_in_a_list_is_told_at_its_line(changes: list[str], expected: str, tmp_path: Path) -> None:
    text = (DATA / "boundary_train.yml").read_text()
    file = tmp_path / "train.yml"
    file.write_text(text)
    config = load_config(file, [*overrides("boundary", ("train", "val"), tmp_path), *changes])
    with pytest.raises(ConfigError) as caught:
        get_train_loaders(config, 0, 1, 0)
    (mistake,) = caught.value.mistakes
    assert mistake.text.startswith(expected), mistake.text
    assert mistake.place is not None and (mistake.place.line == 0 or ".raw.1" in expected)


def predicted_by_pytorch3dunet(kind: str, test: list[str], folder: Path) -> tuple[np.ndarray, Any]:
    """What pytorch-3dunet itself makes of a test file with the same changes, and its performance metric."""
    import h5py
    from pytorch3dunet.predict import get_predictor, get_test_loaders
    from pytorch3dunet.unet3d.config import TorchDevice
    from pytorch3dunet.unet3d.model import get_model as their_model
    from pytorch3dunet.unet3d.utils import load_checkpoint

    values = yaml.safe_load((DATA / f"{kind}_test.yml").read_text()) | {"device": TorchDevice.CPU}
    for change in test:
        path, _, value = change.partition("=")
        *parents, last = path.split(".")
        section = values
        for key in parents:
            section = section[key]
        section[last] = yaml.safe_load(value)
    values["loaders"]["output_dir"] = str(folder)
    model = their_model(values["model"])
    load_checkpoint(values["model_path"], model)
    predictor = get_predictor(model, values)
    scores = [predictor(loader) for loader in get_test_loaders(values)]
    with h5py.File(folder / "cells_predictions.h5") as file:
        return file[predictor.output_dataset][:], scores[0]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("boundary", []),  # 10 x 36 x 36 is not a multiple of 8 x 24 x 24: the last patches overlap
        ("boundary", ["loaders.test.slice_builder.stride_shape=[3, 11, 10]", "model.final_sigmoid=false", "loaders.global_normalization=false",
                      "model.out_channels=3", "predictor.prediction_channel=1", "loaders.batch_size=3"]),
        ("boundary", ["model.name=UNet2D", "loaders.test.slice_builder.patch_shape=[1, 24, 24]",
                      "loaders.test.slice_builder.stride_shape=[1, 16, 16]",
                      "loaders.test.slice_builder.halo_shape=[0, 4, 4]", "predictor.patch_halo=[0, 4, 4]"]),
        ("multiclass", ["loaders.test.slice_builder.stride_shape=[5, 9, 24]", "predictor.prediction_channel=2"]),
    ],
    ids=["seams", "one channel of three", "2-D", "classes"],
)  # fmt: skip
def test_a_test_file_predicts_what_pytorch3dunet_predicts(
    kind: str, changes: list[str], run_cli: RunCli, tmp_path: Path
) -> None:
    import h5py
    import pytorch3dunet.unet3d.model as theirs

    torch.manual_seed(0)
    test = [*overrides(kind, ("test",), tmp_path), *changes]
    model = load_config(DATA / f"{kind}_test.yml", test).model.to_dict()
    weights = saved_by_pytorch3dunet(tmp_path, getattr(theirs, model.pop("name"))(**model))
    test += [f"model_path={weights}"]
    done = run_cli(["predict", DATA / f"{kind}_test.yml", *test, "loaders.output_dir=ours"])
    assert done.rc == 0, done.text
    expected, scores = predicted_by_pytorch3dunet(kind, test, tmp_path / "theirs")
    with h5py.File(tmp_path / "ours" / "cells_predictions.h5") as file:
        found = file["segmentation" if kind == "multiclass" else "predictions"][:]
    assert found.shape == expected.shape
    if kind == "multiclass":
        assert np.array_equal(found, expected)
        assert all(f"{score:.4f}" in done.stdout for score in scores), (scores, done.text)
        assert "predictor.prediction_channel: has no effect: save_segmentation takes the largest" in done.text
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        assert "predictor.blend: 'last': where patches overlap the later one wins" in done.text
    assert ("predictor.patch_halo: has no effect: what is read around" in done.text) == any(
        "halo=" in c for c in changes
    )


@pytest.mark.soak  # docs/moving-over.md does it in every run, for a boundary
@pytest.mark.parametrize("kind", ["multiclass", "dsb2018"])
def test_a_file_trains_and_predicts_from_the_command_line(kind: str, run_cli: RunCli, tmp_path: Path) -> None:
    import h5py

    steps = ["trainer.max_num_iterations=4", "trainer.validate_after_iters=2", "trainer.log_after_iters=1"]
    done = run_cli([DATA / f"{kind}_train.yml", *overrides(kind, ("train", "val"), tmp_path), *steps])
    assert done.rc == 0, done.text
    assert "lr_scheduler.interval: 'validation'" in done.text
    weights = "model_path=checkpoints/checkpoints/best"
    test = [*overrides(kind, ("test",), tmp_path), weights, "loaders.output_dir=predictions"]
    done = run_cli(["predict", DATA / f"{kind}_test.yml", *test])
    assert done.rc == 0, done.text
    files = sorted((tmp_path / "predictions").glob("*.h5"))
    assert [file.name for file in files] == (
        ["cells_predictions.h5"] if kind == "multiclass" else [f"{number}_predictions.h5" for number in range(3)]
    )
    with h5py.File(files[0]) as file:
        labels = file["segmentation"][:]
    assert labels.shape == ((10, 36, 36) if kind == "multiclass" else (40, 44))
    assert labels.dtype.kind == "u"
