"""The digits: real images, splits that are exact, and randomness that somebody else can seed."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits

import dtrain
from dtrain.components.datasets import digits
from dtrain.components.datasets.digits import Digits, DigitsClassification, split_indices

SPLITS = ("train", "val", "test")


def test_the_images_and_labels_are_scikit_learns() -> None:
    data = load_digits()
    for split in SPLITS:
        part = Digits(split)
        assert torch.equal(part.images.reshape(-1, 64), torch.from_numpy(data.data[part.indices]).float() / 16)
        assert torch.equal(part.labels, torch.from_numpy(data.target[part.indices]))


def test_an_item_is_an_image_and_a_label() -> None:
    image, label = Digits("train")[0]
    assert (image.shape, image.dtype, label.shape, label.dtype) == ((1, 8, 8), torch.float32, (), torch.int64)
    part = Digits("train")
    assert (part.images.min(), part.images.max()) == (0, 1)
    assert Digits("train", flat=True)[0][0].shape == (64,)
    assert torch.equal(Digits("train", flat=True)[7][0], part[7][0].flatten())


def test_the_usual_sizes() -> None:
    assert [len(Digits(split)) for split in SPLITS] == [1257, 270, 270]


@pytest.mark.parametrize("seed", [0, 1, 12345])
@pytest.mark.parametrize("fractions", [(0.15, 0.15), (0.1, 0.5), (0.001, 0.998)])
def test_every_image_is_in_exactly_one_split(seed: int, fractions: tuple[float, float]) -> None:
    parts = [Digits(split, seed=seed, val_fraction=fractions[0], test_fraction=fractions[1]) for split in SPLITS]
    assert sorted(torch.cat([part.indices for part in parts]).tolist()) == list(range(1797))
    assert [len(part) for part in parts[1:]] == [round(1797 * fraction) for fraction in fractions]


def test_the_split_depends_on_its_seed_alone_and_is_the_same_on_every_machine() -> None:
    torch.manual_seed(1)
    first = Digits("test").indices
    torch.manual_seed(2)
    assert torch.equal(Digits("test").indices, first)
    assert first[:10].tolist() == [5, 6, 9, 14, 17, 18, 19, 34, 37, 39]
    assert not torch.equal(Digits("test", seed=1).indices, first)


def test_every_class_is_in_every_split() -> None:
    assert all(len(Digits(split).labels.unique()) == 10 for split in SPLITS)


def test_standardized_training_pixels_have_mean_0_and_deviation_1() -> None:
    train, val = Digits("train", standardize=True), Digits("val", standardize=True)
    assert abs(float(train.images.mean())) < 1e-5
    assert float(train.images.std()) == pytest.approx(1, abs=1e-4)
    plain = Digits("train").images
    torch.testing.assert_close(val.images * plain.std() + plain.mean(), Digits("val").images)


def test_without_a_shift_an_item_needs_no_random_numbers() -> None:
    assert Digits.random is False
    part = Digits("train")
    assert part.random is False
    before = torch.get_rng_state()
    assert torch.equal(part[3][0], part[3][0])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_a_shift_moves_the_image_and_background_moves_in(flat: bool, standardize: bool) -> None:
    still = Digits("train", standardize=standardize)
    moving = Digits("train", shift=2, flat=flat, standardize=standardize)
    assert moving.random is True
    image = still[5][0][0]
    expected = set()
    for down in range(-2, 3):
        for right in range(-2, 3):
            moved = image.roll((down, right), (0, 1))
            background = image.min()
            moved[: max(down, 0)] = moved[8 + min(down, 0) :] = background
            moved[:, : max(right, 0)] = moved[:, 8 + min(right, 0) :] = background
            expected.add(tuple(moved.flatten().tolist()))
    found = {tuple(moving[5][0].flatten().tolist()) for _ in range(2000)}
    assert found == expected


def test_a_shift_is_decided_by_torchs_generator() -> None:
    part = Digits("train", shift=2)
    torch.manual_seed(7)
    first = [part[index][0] for index in range(20)]
    torch.manual_seed(7)
    assert all(torch.equal(part[index][0], image) for index, image in enumerate(first))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (dict(split="valid"), ["'valid'", "train, val, test"]),
        (dict(split="val", shift=1), ["shift is 1 in split val", "0 in val"]),
        (dict(split="train", shift=8), ["shift is 8", "0 to 7"]),
        (dict(split="train", val_fraction=0.6, test_fraction=0.4), ["train 0", "val 1078", "at least one"]),
        (dict(split="train", val_fraction=0.0), ["val 0", "test 270"]),
        (dict(split="train", val_fraction=-0.1), ["val_fraction -0.1"]),
    ],
)
def test_a_wrong_argument_says_what_is_possible(arguments: dict, parts: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        Digits(**arguments)
    assert [part for part in parts if part not in str(error.value)] == []


def test_fractions_are_rounded_to_whole_images() -> None:
    assert [len(part) for part in split_indices(10, 0, 0.14, 0.26).values()] == [6, 1, 3]


def test_the_older_name_is_the_same_class() -> None:
    assert DigitsClassification is Digits


def run(code: str, **env: str) -> str:
    """What a fresh interpreter prints."""
    path = str(Path(dtrain.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=dict(os.environ) | {"PYTHONPATH": path} | env,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_data_are_read_without_importing_scikit_learn() -> None:
    code = "import sys; from dtrain.components.datasets.digits import Digits; Digits('train')"
    assert run(f"{code}; print('sklearn' in sys.modules)") == "False\n"


def test_where_sys_path_does_not_show_the_file_scikit_learn_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Digits("val")
    monkeypatch.setattr(digits, "FILE", Path("not", "there.csv.gz"))
    found = Digits("val")
    assert torch.equal(found.images, expected.images)
    assert torch.equal(found.labels, expected.labels)


@pytest.mark.slow
def test_without_scikit_learn_the_cure_is_named(tmp_path: Path) -> None:
    # A package of the same name that is found first and has nothing in it.
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("sklearn/__init__.py", "")
    code = """
import sys
from pathlib import Path
from dtrain.components.datasets import digits
digits.FILE = Path("not", "there.csv.gz")
try:
    digits.Digits("train")
except ModuleNotFoundError as error:
    print(error)
"""
    path = f"{tmp_path / 'empty.zip'}:{Path(dtrain.__file__).parent.parent}"
    assert run(code, PYTHONPATH=path) == "Digits needs scikit-learn for its images: pip install scikit-learn\n"
