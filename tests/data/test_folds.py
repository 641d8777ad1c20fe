"""Folds: which file is which fold's, what train and val then are, and what is refused."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest

from dtrain.config.check import check
from dtrain.config.errors import ConfigError
from dtrain.config.load import from_mapping, load_config, to_yaml
from dtrain.data.folds import dealt, fold_numbers, fold_settings
from dtrain.dataloader import get_train_loaders

NAMES = [f"case{number:02d}" for number in range(23)]


def test_folds_of_the_same_size_by_names_alone() -> None:
    folds = dealt(NAMES, 5)
    assert sorted(Counter(folds).values()) == [4, 4, 5, 5, 5]
    order = sorted(NAMES, key=lambda name: hashlib.sha256(f"0:{name}".encode()).digest())
    assert dict(zip(NAMES, folds, strict=True)) == {name: number % 5 for number, name in enumerate(order)}
    assert dealt(NAMES[::-1], 5) == folds[::-1]  # in whatever order they are listed
    assert dealt(NAMES, 5, seed=1) != folds
    assert len(set(dealt(["b", "a", "c", "a", "b"], 3))) == 3  # equal ones stay together


def test_a_new_file_moves_no_other_one_where_that_is_promised() -> None:
    before = dealt(NAMES, 5, balanced=False)
    after = dealt([*NAMES, "new"], 5, balanced=False)
    assert after[:-1] == before
    assert len(set(before)) == 5
    assert dealt([*NAMES, "new"], 5)[:-1] != dealt(NAMES, 5)


def test_stratified() -> None:
    classes = ["rare"] * 5 + ["common"] * 18
    folds = dealt(NAMES, 5, classes=classes)
    assert sorted(fold for fold, kind in zip(folds, classes, strict=True) if kind == "rare") == [0, 1, 2, 3, 4]
    assert sorted(Counter(folds).values()) == [4, 4, 5, 5, 5]


def settings_of(**more: Any) -> dict[str, Any]:
    return fold_settings(**{"count": 2, **more})


def test_by_groups_and_by_what_a_pattern_finds() -> None:
    items: Any = SimpleNamespace(patient=np.array([3, 3, 1, 1, 2, 3]))
    items = type("Items", (), {"patient": np.array([3, 3, 1, 1, 2, 3]), "__len__": lambda self: 6})()
    folds = fold_numbers(items, settings_of(by="groups", groups="patient"))
    assert folds[0] == folds[1] == folds[5] and folds[2] == folds[3]
    assert len(set(folds)) == 2
    files = [(f"/data/p{number // 2}_{number % 2}.png", 0) for number in range(6)]
    images = type("Images", (), {"samples": files, "__len__": lambda self: 6})()
    folds = fold_numbers(images, settings_of(pattern=r"p(\d+)_"))
    assert folds[0::2] == folds[1::2]
    assert folds[0::2] == dealt(["0", "1", "2"], 2)
    with pytest.raises(ValueError, match=r"pattern 'case' finds nothing in data/p0_0\.png"):
        fold_numbers(images, settings_of(pattern="case"))
    with pytest.raises(ValueError, match="groups is patient, and Images has no attribute or column"):
        fold_numbers(images, settings_of(by="groups", groups="patient"))
    with pytest.raises(ValueError, match="by is file, and Items has no volumes, samples or files"):
        fold_numbers(items, settings_of())


@pytest.fixture
def volumes(tmp_path: Path) -> Path:
    for number in range(5):
        with h5py.File(tmp_path / f"case{number}.h5", "w") as file:
            file["raw"] = np.full((4, 8, 8), number, np.float32)
            file["label"] = np.zeros((4, 8, 8), np.uint8)
    return tmp_path


def config_of(folder: Path, folds: Any = None, **sections: Any) -> dict[str, Any]:
    train = {"file_paths": str(folder), "batch_size": 3, "transforms": [{"name": "RandomFlip"}]}
    return {
        "model": {"name": "Identity"},
        "loaders": {
            "name": "StandardHDF5Dataset",
            "slice_builder": {"name": "SliceBuilder", "patch_shape": [4, 4, 8]},
            "folds": {"count": 5, "fold": 2} if folds is None else folds,
            "train": train,
            "val": {"transforms": []},
            **sections,
        },
        "loss": {"name": "CrossEntropyLoss"},
        "optimizer": {"name": "SGD", "lr": 0.1},
        "trainer": {"max_epochs": 1},
    }


def test_train_and_val_are_parts_of_one_dataset(volumes: Path) -> None:
    folds = dict(zip([f"case{number}" for number in range(5)], dealt([f"case{n}" for n in range(5)], 5), strict=True))
    seen = []
    for fold in range(5):
        config = from_mapping(config_of(volumes, {"count": 5, "fold": fold}))
        check(config)
        loaders = get_train_loaders(config, 0, 1, 0)
        assert loaders.train is not None and loaders.val is not None
        train: Any = loaders.train.loader.dataset.dataset  # type: ignore[attr-defined]
        val: Any = loaders.val.dataset.dataset  # type: ignore[attr-defined]
        assert {volume.name for volume in train.volumes} == {name for name in folds if folds[name] != fold}
        assert [volume.name for volume in val.volumes] == [name for name in folds if folds[name] == fold]
        assert (len(train), len(val)) == (8, 2)
        assert train.random and not val.random
        number = float(val.volumes[0].name[-1])
        assert val[1][0].unique().tolist() == [number]
        assert sorted({item[0].max().item() for item in map(train.__getitem__, range(8))}) == [
            float(other) for other in range(5) if other != number
        ]
        seen += val.volumes
    assert len({volume.name for volume in seen}) == 5


def test_a_written_config_is_read_back_to_the_same(volumes: Path) -> None:
    (volumes / "c.yaml").write_text(to_yaml(config_of(volumes)))
    config = load_config(volumes / "c.yaml", ["loaders.folds.fold=4"])
    (volumes / "again.yaml").write_text(to_yaml(config))
    again = load_config(volumes / "again.yaml")
    assert again.loaders.val.to_dict() == config.loaders.val.to_dict()
    assert again.loaders.val.file_paths == str(volumes)
    assert again.loaders.folds.fold == 4


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        config = from_mapping(values)
        check(config)
        get_train_loaders(config, 0, 1, 0)
    return str(error.value)


def test_mistakes(volumes: Path) -> None:
    assert "loaders.folds.fold: is 5; possible: 0 to 4" in refusal(config_of(volumes, {"count": 5, "fold": 5}))
    assert "loaders.folds.count: must be at least 2, found 1" in refusal(config_of(volumes, {"count": 1}))
    assert "'cuont'" in refusal(config_of(volumes, {"cuont": 5})) and "did you mean" in refusal(
        config_of(volumes, {"cuont": 5})
    )
    assert "loaders.train.transforms: would change the validation's part" in refusal(config_of(volumes, val={}))
    assert "loaders.folds.count: count is 6, and there are 5 to be dealt" in refusal(config_of(volumes, {"count": 6}))
    assert "loaders.folds.by: by is index, which would put patches of one file into" in refusal(
        config_of(volumes, {"count": 5, "by": "index"})
    )
    assert "stratify: needs balanced: true" in refusal(
        config_of(volumes, {"count": 5, "balanced": False, "stratify": "kind"})
    )


def test_items_that_are_divided_otherwise_in_val_are_no_folds(tmp_path: Path) -> None:
    config = config_of(tmp_path, {"count": 2, "by": "index"})
    config["loaders"] = {
        "name": "Digits", "batch_size": 4, "folds": {"count": 2, "by": "index"},
        "train": {"split": "train"}, "val": {"split": "test"},
    }  # fmt: skip
    text = refusal(config)
    assert "loaders.val: has 270 items to be split into folds, and train has 1,257" in text, text
    config["loaders"]["val"] = {}
    accepted = from_mapping(config)
    check(accepted)
    loaders = get_train_loaders(accepted, 0, 1, 0)
    train, val = loaders.train.loader.dataset.dataset, loaders.val.dataset.dataset  # type: ignore[attr-defined,union-attr]
    assert sorted(train.indices + val.indices) == list(range(1257))
