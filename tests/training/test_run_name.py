"""Names of runs that a config does not name."""

import time

import pytest

from dtrain.training.run_name import made_run_name

DATE = time.strptime("2026-07-28", "%Y-%m-%d")


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "resnet-0728"),
        (["optimizer.lr=0.001"], "resnet-lr0.001-0728"),
        (["optimizer.lr=1e-3", "model.depth=4"], "resnet-lr1e-3-depth4-0728"),
        (["optimizer.lr=1e-3", "optimizer.lr=1e-4"], "resnet-lr1e-4-0728"),
        (["optimizer.name=SGD", "trainer.compile=true"], "resnet-SGD-compile-true-0728"),
        (["model.name='my.nets:Net'", "loaders.train.path=data/a b.h5"], "resnet-Net-path-data-a-b.h5-0728"),
        (["trainer.checkpoint_dir=runs/7", "mlflow.tracking_uri=store", "loaders.num_workers=4"], "resnet-0728"),
        (["model.api_token=hf_abcdefghijklmnopqrstuvwx"], "resnet-0728"),
        (["loss.weight=[1, 2]"], "resnet-weight1-2-0728"),
    ],
)  # fmt: skip
def test_a_run_is_named_after_its_experiment_the_overrides_and_the_date(
    overrides: list[str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "strftime", lambda form, now=DATE, really=time.strftime: really(form, now))
    assert made_run_name("resnet", overrides) == name


def test_a_name_of_many_overrides_stays_readable() -> None:
    name = made_run_name("resnet", [f"model.some_option_{number}={number}" for number in range(20)])
    assert len(name) <= 100 and name.startswith("resnet-some_option_00-") and "-and-more-" in name
