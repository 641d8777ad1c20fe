"""A config is read into calls once, and each call's name is looked up once; a config that was changed is read anew."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dtrain
from dtrain.config import schema
from dtrain.config.build import build, defaults
from dtrain.config.check import check, notes
from dtrain.config.errors import ConfigError
from dtrain.config.load import from_mapping
from dtrain.config.schema import calls


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    return {
        "device": "cpu",
        "model": {"name": "ViT", "image_size": 8, "patch_size": 4, "channels": 1, "num_classes": 10, "dim": 8,
                  "depth": 1, "heads": 1, "mlp_dim": 8},
        "loaders": {"name": "Digits", "batch_size": 64, "train": {"split": "train"}, "val": {"split": "val"}},
        "loss": {"name": "CrossEntropyLoss"},
        "metrics": {"name": ["Accuracy", "Precision"], "task": "multiclass", "num_classes": 10},
        "optimizer": {"name": "SGD", "lr": 0.1},
        "lr_scheduler": {"name": "CosineAnnealingLR"},
        "trainer": {"max_steps": 1, "checkpoint_dir": str(tmp_path / "run")},
        "mlflow": {"tracking_uri": f"sqlite:///{tmp_path}/mlflow.db", "system_metrics": False},
    }  # fmt: skip


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """What was read and looked up since the test began."""
    seen: dict[str, list[Any]] = {"readings": [], "names": []}

    def counted(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def inner(first: Any, *rest: Any) -> Any:
            seen[kind].append(first)
            return function(first, *rest)

        return inner

    monkeypatch.setattr(schema._Reader, "all_calls", counted("readings", schema._Reader.all_calls))
    monkeypatch.setattr(schema, "locate", counted("names", schema.locate))
    return seen


def test_one_start_reads_the_sections_once_and_looks_each_call_up_once(
    values: dict[str, Any], count: dict[str, list[Any]]
) -> None:
    config = from_mapping(values)
    check(config)  # as the command does before torch is imported
    dtrain.create_trainer(config)
    assert len(count["readings"]) == 1
    assert sorted(count["names"]) == sorted(call.name for call in calls(config).values())


def test_components_inside_a_call_are_looked_up_once(count: dict[str, list[Any]]) -> None:
    linear = {"name": "Linear", "in_features": 1, "out_features": 1}
    config = from_mapping({"model": {"name": "torch.nn.ModuleList", "modules": [linear, {"name": "ReLU"}]}})
    for _ in range(2):
        assert len(build(config, "model")) == 2
    notes(config)
    assert [name for name in count["names"] if name in ("torch.nn.ModuleList", "Linear", "ReLU")] == [
        "torch.nn.ModuleList",
        "Linear",
        "ReLU",
    ]


def test_a_value_that_is_changed_after_the_check_is_what_is_built(values: dict[str, Any]) -> None:
    config = from_mapping(values)
    check(config)
    config.optimizer.name = "AdamW"
    config.trainer.max_steps = 7
    assert calls(config)["optimizer"].target.name == "AdamW"
    assert defaults(config, "trainer")["max_steps"] == 7
    config.optimizer.name = "AdamWW"
    with pytest.raises(ConfigError, match=r"optimizer\.name: there is no 'AdamWW'; did you mean 'AdamW'"):
        check(config)


def test_a_key_that_is_added_after_the_check_is_read(values: dict[str, Any]) -> None:
    config = from_mapping(values)
    check(config)
    with config.unlocked():
        config.loaders.train.spilt = "train"
    with pytest.raises(ConfigError, match=r"loaders\.train\.spilt: Digits got an unexpected argument 'spilt'"):
        check(config)
