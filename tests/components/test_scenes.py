"""Scenes of digits and volumes of cells: labels that are exact, splits that share nothing, the same files each time."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

import dtrain
from dtrain.components.datasets import make as make_module
from dtrain.components.datasets.cell_volume import CellVolume, walls
from dtrain.components.datasets.digits_scene import DigitsScene
from dtrain.components.datasets.make import KINDS, main, make
from dtrain.components.datasets.tooth_arch import ToothArch

SPLITS = ("train", "val", "test")
CLEAR = dict(noise=0.0, gain=(1.0, 1.0))
SMALL = dict(shape=(8, 24, 32), cell_size=10.0)

# Scenes of digits


def test_an_item_is_an_image_and_a_class_for_each_pixel():
    data = DigitsScene("train", length=20, size=(48, 72), channels=3)
    assert (len(data), data.num_classes) == (20, 11)
    for image, label in data:
        assert (image.shape, image.dtype, label.shape, label.dtype) == (
            (3, 48, 72),
            torch.float32,
            (48, 72),
            torch.int64,
        )
        assert image.min() >= 0
        assert image.max() <= 1
        assert set(label.unique().tolist()) <= {*range(11)}


@pytest.mark.parametrize("channels", [1, 3])
def test_a_pixel_is_labelled_exactly_where_its_digit_has_ink(channels):
    for image, label in DigitsScene("train", length=20, channels=channels, **CLEAR):
        assert torch.equal(label > 0, image[0] > 0.25)
    for image, label in DigitsScene("train", length=20, channels=channels, noise=0.0, gain=(0.5, 0.5)):
        assert torch.equal(label > 0, image[0] > 0.125)


def trimmed(image):
    """What is left without empty rows and columns at the border."""
    rows, columns = image.any(1).nonzero()[0], image.any(0).nonzero()[0]
    return image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].tobytes()


@pytest.mark.parametrize("split", SPLITS)
def test_the_digits_are_real_ones_of_the_split_with_their_own_class(split):
    source = load_digits()
    data = DigitsScene(split, length=60, per_image=(1, 1), zoom=(3, 3), **CLEAR)
    known = {trimmed(source.images[index].astype(np.float32) / 16): source.target[index] for index in data.indices}
    for image, label in data:
        rows, columns = image[0].numpy().any(1).nonzero()[0], image[0].numpy().any(0).nonzero()[0]
        small = image[0].numpy()[rows[0] : rows[-1] + 1 : 3, columns[0] : columns[-1] + 1 : 3]
        assert label.max() == known[small.tobytes()] + 1


@pytest.mark.parametrize("arguments", [{}, dict(seed=5), dict(val_fraction=0.3, test_fraction=0.3)])
def test_no_digit_is_in_two_splits(arguments):
    parts = [set(DigitsScene(split, **arguments).indices.tolist()) for split in SPLITS]
    assert sorted(index for part in parts for index in part) == [*range(1797)]


def test_fewer_classes():
    few = DigitsScene("train", length=30, digits=(7, 2))
    labels = torch.cat([label.flatten() for _, label in few])
    assert (few.num_classes, labels.unique().tolist()) == (3, [0, 1, 2])
    source = load_digits()
    assert {*source.target[few.indices]} == {2, 7}
    assert all(source.target[index] == (7, 2)[place - 1] for index, place in zip(few.indices, few.classes, strict=True))
    two = DigitsScene("train", length=30, binary=True)
    assert (two.num_classes, torch.stack([label for _, label in two]).unique().tolist()) == (2, [0, 1])
    assert torch.equal(two[3][1] > 0, DigitsScene("train")[3][1] > 0)


def test_digits_do_not_overlap_and_one_without_room_is_left_out():
    for _, label in DigitsScene("train", length=20, size=(16, 16), per_image=(5, 5), zoom=(2, 2)):
        assert len(label[label > 0].unique()) == 1
    for number in (1, 4):
        data = DigitsScene("train", length=10, size=(128, 128), per_image=(number, number), digits=(0,), **CLEAR)
        # A zero is one piece, so that pieces are digits.
        assert [ndimage.label(image[0].numpy() > 0, np.ones((3, 3)))[1] for image, _ in data] == [number] * 10


def test_noise_and_gain_are_what_was_asked_for():
    image, label = DigitsScene("val", noise=0.2)[1]
    ground = image[0][label == 0]  # darker than black is black, so the brighter half tells the deviation
    assert float(ground[ground > 0].square().mean().sqrt()) == pytest.approx(0.2, rel=0.1)
    grey = DigitsScene("val", length=20, noise=0.0, gain=(0.3, 0.6), per_image=(1, 1))
    assert all(0.25 < float(image.max()) <= 0.6 for image, _ in grey)
    coloured = DigitsScene("val", length=5, noise=0.0, channels=3, per_image=(1, 1))
    for image, _ in coloured:
        ratios = (image[0] / image[1])[image[1] > 0]
        assert float(ratios.std()) < 1e-5
        assert abs(float(ratios.mean()) - 1) > 1e-3


def test_a_scene_depends_on_seed_split_and_index_alone():
    state = torch.get_rng_state()
    data, longer = DigitsScene("train", length=4), DigitsScene("train", length=50)
    backwards = [data[index] for index in (3, 2, 1, 0)][::-1]
    for index, (image, label) in enumerate(backwards):
        assert torch.equal(image, longer[index][0])
        assert torch.equal(label, longer[index][1])
    assert torch.equal(torch.get_rng_state(), state)
    assert data.random is False
    others = [DigitsScene(split, seed=seed)[index][0] for split in SPLITS for seed in (0, 1) for index in (0, 1)]
    assert len({image.numpy().tobytes() for image in others}) == 12


def test_fresh_scenes_follow_torchs_generator():
    data = DigitsScene("train", fresh=True)
    assert data.random is True
    torch.manual_seed(3)
    first = [data[0] for _ in range(3)]
    torch.manual_seed(3)
    assert all(torch.equal(image, data[7][0]) for image, _ in first)  # the seed alone, which knows the index
    assert len({image.numpy().tobytes() for image, _ in first}) == 3


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (dict(split="valid"), ["'valid'", "train, val, test"]),
        (dict(length=0), ["length is 0", "1 and more"]),
        (dict(channels=0), ["channels is 0"]),
        (dict(noise=-1), ["noise is -1"]),
        (dict(seed=-1), ["seed is -1"]),
        (dict(split="val", fresh=True), ["fresh", "split val", "train alone"]),
        (dict(size=(64,)), ["size is [64]", "two numbers"]),
        (dict(size=(64, 20)), ["[64, 20]", "enlarged by 3 needs 24"]),
        (dict(zoom=(3, 2)), ["zoom is [3, 2]", "least"]),
        (dict(per_image=(0, 2)), ["per_image is [0, 2]", "1 or more"]),
        (dict(digits=()), ["digits is []"]),
        (dict(digits=(1, 1)), ["digits is [1, 1]", "different"]),
        (dict(digits=(3, 10)), ["[3, 10]", "0 to 9"]),
        (dict(val_fraction=0.6, test_fraction=0.4), ["train 0"]),
    ],
)
def test_a_wrong_argument_of_the_scenes_says_what_is_possible(arguments, parts):
    with pytest.raises(ValueError) as error:
        DigitsScene(**dict(split="train") | arguments)
    assert [part for part in parts if part not in str(error.value)] == []


def test_there_is_no_scene_and_no_volume_beyond_the_last():
    for data in (DigitsScene("train", length=3), CellVolume("train", length=3, **SMALL)):
        for index in (3, -1):
            with pytest.raises(IndexError, match="of 3"):
                data[index]


# Volumes of cells


def test_a_volume_is_an_image_and_a_label_for_each_voxel():
    for labels, highest in (("boundary", 1), ("semantic", 2), ("instance", None)):
        data = CellVolume("train", length=2, labels=labels, **SMALL)
        image, label = data[1]
        assert (image.shape, image.dtype, label.shape, label.dtype) == (
            (1, 8, 24, 32),
            torch.float32,
            (8, 24, 32),
            torch.int64,
        )
        assert image.isfinite().all()
        numbers = label.unique().tolist()
        assert numbers == [*range(1 + (highest or numbers[-1]))]
    assert numbers[-1] > 5


def test_walls_are_the_voxels_with_a_face_to_another_number():
    instance = CellVolume("val", **SMALL).cells(0).instance
    expected = np.zeros(instance.shape, bool)
    for place in np.ndindex(*instance.shape):
        for axis in range(3):
            for step in (-1, 1):
                other = list(place)
                other[axis] += step
                if 0 <= other[axis] < instance.shape[axis] and instance[tuple(other)] != instance[place]:
                    expected[place] = True
    assert expected.any()
    assert np.array_equal(walls(instance), expected)
    assert np.array_equal(walls(instance[0]), walls(instance[:1])[0])


def test_the_labels_are_of_one_geometry():
    parts = {labels: CellVolume("val", labels=labels, **SMALL)[0] for labels in ("boundary", "semantic", "instance")}
    instance = parts["instance"][1]
    wall = torch.from_numpy(walls(instance.numpy()))
    assert torch.equal(parts["boundary"][1], wall.long())
    assert torch.equal(parts["semantic"][1], torch.where(wall, 2, (instance > 0).long()))
    assert len({image.numpy().tobytes() for image, _ in parts.values()}) == 1


def test_what_is_stained_is_exactly_what_is_labelled():
    for image, label in CellVolume("train", length=3, blur=(0, 0), photons=1e9, noise=0, **SMALL):
        assert torch.equal(image[0] > 0.25, label > 0)
        assert float(image[0][label > 0].min()) > 0.39
        assert float(image[0][label > 0].std()) > 0.03  # unevenly


def test_noise_and_blur_hide_the_walls_from_a_threshold():
    image, label = CellVolume("train")[0]
    seen, wall = image[0], label > 0
    overlaps = [float(((seen > t) & wall).sum() / ((seen > t) | wall).sum()) for t in np.linspace(0.1, 0.9, 33)]
    assert 0.4 < max(overlaps) < 0.75


def test_a_cell_is_one_piece_and_has_fewer_slices_than_rows():
    instance = CellVolume("train", shape=(16, 48, 48), cell_size=14.0, spacing=2.0).cells(0).instance
    pieces = [ndimage.label(instance == number)[1] for number in range(1, instance.max() + 1)]
    assert set(pieces) == {1}
    extents = np.array([[part.stop - part.start for part in place] for place in ndimage.find_objects(instance)])
    slices, rows, columns = extents.mean(0)
    assert 1.5 < (rows + columns) / 2 / slices < 2.5


def test_cells_have_the_size_that_was_asked_for():
    for cell_size in (8.0, 12.0):
        instance = CellVolume("train", shape=(16, 48, 48), cell_size=cell_size).cells(0).instance
        # The tissue's surface cuts many, so the larger ones tell; a voxel is two pixels long.
        sizes = 2 * np.bincount(instance[instance > 0])[1:]
        assert float(np.percentile(sizes, 85)) == pytest.approx(cell_size**3, rel=0.3)


def test_a_volume_depends_on_seed_split_and_index_alone():
    state = torch.get_rng_state()
    data, longer = CellVolume("train", length=2, **SMALL), CellVolume("train", length=9, **SMALL)
    second, first = data[1], data[0]
    assert torch.equal(first[0], longer[0][0])
    assert torch.equal(second[1], longer[1][1])
    assert torch.equal(torch.get_rng_state(), state)
    assert data.random is False
    others = [CellVolume(split, seed=seed, **SMALL)[index] for split in SPLITS for seed in (0, 1) for index in (0, 1)]
    assert len({image.numpy().tobytes() for image, _ in others}) == 12
    assert len({label.numpy().tobytes() for _, label in others}) == 12


def test_a_volume_is_made_once_and_is_the_callers_to_change():
    data = CellVolume("train", **SMALL)
    image, label = data[0]
    expected = image.clone(), label.clone()
    image.zero_(), label.zero_()
    assert data.cells(0) is data.cells(0)
    assert torch.equal(data[0][0], expected[0])
    assert torch.equal(data[0][1], expected[1])
    assert next(iter(DataLoader(data, batch_size=4)))[0].shape == (4, 1, 8, 24, 32)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (dict(split="valid"), ["'valid'", "train, val, test"]),
        (dict(labels="wall"), ["'wall'", "boundary, instance, semantic"]),
        (dict(shape=(64, 64)), ["shape is [64, 64]", "three sides"]),
        (dict(shape=(2, 64, 64)), ["shape is [2, 64, 64]", "4 or more"]),
        (dict(length=0), ["length is 0"]),
        (dict(cell_size=1), ["cell_size is 1", "4 and more"]),
        (dict(spacing=0), ["spacing is 0"]),
        (dict(blur=(1,)), ["blur is [1]"]),
        (dict(warp=0.5), ["warp is 0.5", "0 to 0.2"]),
        (dict(photons=0), ["photons is 0"]),
        (dict(noise=-0.1), ["noise is -0.1"]),
        (dict(seed=-1), ["seed is -1"]),
    ],
)
def test_a_wrong_argument_of_the_cells_says_what_is_possible(arguments, parts):
    with pytest.raises(ValueError) as error:
        CellVolume(**dict(split="train") | arguments)
    assert [part for part in parts if part not in str(error.value)] == []


def test_without_scipy_the_cure_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ModuleNotFoundError, match="pip install scipy"):
        CellVolume("train")


# Files


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_volumes_are_written_as_they_are(tmp_path):
    make(CellVolume, tmp_path / "cells", {"train": 2, "val": 1}, labels="instance", **SMALL)
    assert sorted(contents(tmp_path)) == [
        "cells/train/volume-0000.h5",
        "cells/train/volume-0001.h5",
        "cells/val/volume-0000.h5",
    ]
    image, label = CellVolume("train", labels="instance", **SMALL)[1]
    with h5py.File(tmp_path / "cells/train/volume-0001.h5") as file:
        assert (file["raw"].dtype, file["label"].dtype) == (np.float32, np.uint8)
        assert np.array_equal(file["raw"], image[0])
        assert np.array_equal(file["label"], label)


def test_scenes_are_written_as_volumes_of_one_slice(tmp_path):
    make(DigitsScene, tmp_path / "scenes", {"test": 2}, channels=3)
    image, label = DigitsScene("test", channels=3)[1]
    with h5py.File(tmp_path / "scenes/test/volume-0001.h5") as file:
        assert np.array_equal(file["raw"], image[:, None])
        assert np.array_equal(file["label"], label[None])


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_scenes_are_written_as_images_and_masks(tmp_path, channels, mode):
    make(DigitsScene, tmp_path / "scenes", {"val": 3}, "images", channels=channels)
    image, label = DigitsScene("val", channels=channels)[2]
    seen = Image.open(tmp_path / "scenes/val/images/0002.png")
    mask = Image.open(tmp_path / "scenes/val/masks/0002.png")
    assert (seen.mode, mask.mode) == (mode, "L")
    pixels = np.asarray(seen).reshape(64, 64, channels).transpose(2, 0, 1)
    assert np.array_equal(pixels, np.round(255 * image.numpy()))
    assert np.array_equal(np.asarray(mask), label)


def test_rows_of_teeth_are_written_as_one_table(tmp_path):
    make(ToothArch, tmp_path / "teeth", {"test": 5}, feature_dim=8)
    (features, boxes, mask), label = ToothArch("test", feature_dim=8)[4]
    with h5py.File(tmp_path / "teeth/test/rows.h5") as file:
        for name, expected in dict(features=features, boxes=boxes, mask=mask, label=label).items():
            assert file[name].shape == (5, *expected.shape)
            assert np.array_equal(file[name][4], expected)


@pytest.mark.slow
def test_another_process_makes_the_same_bytes(tmp_path):
    commands = {
        "cells": ["cell-volume", "--shape", "8", "24", "32", "--cell-size", "10", "--seed", "3", "--count", "2"],
        "scenes": ["digits-scene", "--format", "images", "--channels", "3", "--split", "val", "--count", "4"],
    }
    for name, command in commands.items():
        assert main([*command, "--output", str(tmp_path / "here" / name)]) == 0
        done = subprocess.run(
            [sys.executable, "-m", "dtrain.components.datasets.make", *command, "--output", f"there/{name}"],
            cwd=tmp_path,
            env=dict(os.environ) | {"PYTHONPATH": str(Path(dtrain.__file__).parent.parent), "PYTHONHASHSEED": "7"},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert (done.returncode, done.stderr) == (0, "")
    here, there = contents(tmp_path / "here"), contents(tmp_path / "there")
    assert len(here) == 2 + 8
    assert here == there


def test_the_data_are_the_same_on_every_machine():
    image, label = DigitsScene("train")[0]
    assert hashlib.sha256(label.numpy().tobytes()).hexdigest()[:16] == "45a8220fb45b6ab6"
    assert image[0, 5, 5:9].tolist() == pytest.approx([0, 0, 0, 0.1511], abs=1e-3)
    cells = CellVolume("train", **SMALL).cells(0)
    assert np.bincount(cells.instance.ravel())[:6].tolist() == [3229, 193, 431, 132, 116, 107]
    assert cells.raw[4, 10, 10:14].tolist() == pytest.approx([0.0897, 0.0479, 0.8422, 0.6658], abs=1e-3)


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    assert end.value.code == 2
    return capsys.readouterr().err


def test_what_is_there_is_never_overwritten(tmp_path, capsys):
    command = ["digits-scene", "--output", str(tmp_path / "scenes"), "--count", "2"]
    assert main(command) == 0
    assert "wrote 2 of train" in capsys.readouterr().out
    before = contents(tmp_path)
    error = refused(capsys, *command, "--split", "val", "train")
    assert f"{tmp_path / 'scenes' / 'train'} is there already; remove it" in error
    assert contents(tmp_path) == before
    assert main([*command, "--split", "val"]) == 0  # another split may join it
    (tmp_path / "file").write_text("mine")
    assert "is a file" in refused(capsys, "digits-scene", "--output", str(tmp_path / "file"), "--count", "2")
    assert (tmp_path / "file").read_text() == "mine"


def test_what_cannot_be_finished_leaves_nothing(tmp_path, monkeypatch, capsys):
    write = make_module._write_hdf5

    def full(file, **arrays):
        if file.name == "volume-0001.h5" and file.parent.name == "val":
            raise OSError("No space left on device")
        write(file, **arrays)

    monkeypatch.setattr(make_module, "_write_hdf5", full)
    command = ["digits-scene", "--output", str(tmp_path / "scenes"), "--split", "train", "val", "--count", "2"]
    assert main(command) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cell-volume", "--count", "0"], "--count 0: expected"),
        (["cell-volume", "--count", "1", "2"], "or one for each split"),
        (["cell-volume", "--count", "1", "--split", "val", "val"], "a split is named twice"),
        (["cell-volume", "--count", "1", "--split", "valid"], "invalid choice: 'valid'"),
        (["cell-volume", "--count", "1", "--shape", "4", "4"], "shape is [4, 4]"),
        (["cell-volume", "--count", "1", "--format", "images"], "unrecognized arguments"),
        (["digits-scene", "--count", "1", "--format", "images", "--channels", "2"], "1 or 3 channels"),
        (["digits-scene", "--count", "1", "--format", "tiff"], "invalid choice: 'tiff'"),
        (["tooth-arch", "--count", "1", "--missing", "2"], "missing is 2"),
        (["cells", "--count", "1"], "invalid choice: 'cells'"),
    ],
)
def test_a_wrong_command_line_writes_nothing(tmp_path, capsys, arguments, message):
    assert message in refused(capsys, *arguments, "--output", str(tmp_path / "x" / "y"))
    assert [*tmp_path.iterdir()] == []


def test_help_tells_every_argument_and_an_example(capsys):
    for kind in KINDS:
        with pytest.raises(SystemExit) as end:
            main([kind, "--help"])
        assert end.value.code == 0
        text = capsys.readouterr().out
        assert "python -m dtrain.components.datasets.make digits-scene" in text
        assert "--seed" in text
        assert " ".join(text.split()).count("Default: ") >= 8 - (kind == "tooth-arch")


def test_the_example_in_the_help_works(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    examples = [line.split()[3:] for line in make_module.EXAMPLE.splitlines()[1:]]
    for words in examples:
        start = words.index("--count") + 1
        words[start:] = ["1"] * len(words[start:])
        assert main(words) == 0
    assert sorted({path.split("/")[1] for path in contents(tmp_path)}) == ["cells", "scenes"]
