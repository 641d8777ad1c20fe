"""What trainer.fsdp can ask for beside sharding: copies of the model, types of messages, host memory, compile."""

from pathlib import Path
from typing import Any

import pytest
from whole_runs import EXACT, Place, close, figures, last, same_training, write_config

from dtrain.config.check import check
from dtrain.config.errors import ConfigError
from dtrain.config.load import load_config

SETTINGS: dict[str, Any] = {
    **EXACT, "loaders.num_workers": 0, "trainer.max_epochs": 2, "trainer.log_every_steps": 1, "trainer.pictures": False,
    "lr_scheduler": {"name": "CosineAnnealingLR", "interval": "step", "T_max": 20}, "loaders.test": None,
    "loaders.batch_size": None, "loaders.global_batch_size": 4, "model.dropout": 0.0, "model.norm": False,
    "trainer.strategy": "fsdp",
}  # fmt: skip
PARTS = {"min_parameters": 10}


def trained(place: Place, name: str, ranks: int, *overrides: str, **changes: Any) -> Path:
    place.run(place.config(name, **SETTINGS | changes), *overrides, ranks=ranks)
    return place.path(name)


def sharded(place: Place) -> Path:
    """By two ranks, each with a half of all."""
    return Path(place.once("fsdp-halves", lambda: str(trained(place, "fsdp-halves", 2, **{"trainer.fsdp": PARTS}))))


@pytest.mark.slow
def test_two_copies_on_two_ranks_each_are_the_same_training_and_resume(place: Place) -> None:
    """A mesh of 2 x 2 ranks; stopped in an epoch and resumed with the same figures, and by plain shards as well."""
    copies = {"trainer.fsdp": PARTS | {"replicate": 2}}
    trained(place, "fsdp-copies", 4, "trainer.max_steps=5", **copies)
    run = trained(place, "fsdp-copies", 4, **copies)
    expected = figures(sharded(place))
    found = figures(run)
    assert len(expected["train/loss"]) == 8
    close({key: {step: found[key][step] for step in steps} for key, steps in expected.items()}, expected)
    for name, value in last(sharded(place)).weights.items():
        assert last(run).weights[name].allclose(value, rtol=1e-4, atol=1e-6), name


@pytest.mark.slow
def test_shards_in_host_memory_and_compiled_parts_change_nothing(place: Place) -> None:
    """On a CPU all memory is the host's; that shards come and go all the same, the GPU check shows."""
    options = {"trainer.fsdp": PARTS | {"cpu_offload": True}, "trainer.compile": {"backend": "aot_eager"}}
    run = trained(place, "fsdp-offload-compiled", 2, **options)
    close(figures(run), figures(sharded(place)))
    assert last(run).weights.keys() == last(sharded(place)).weights.keys()


@pytest.mark.slow
def test_gradients_summed_in_bf16_are_rounded_and_weights_stay_fp32(place: Place) -> None:
    run = trained(place, "fsdp-bf16-sums", 2, **{"trainer.fsdp": PARTS | {"reduce_dtype": "bf16"}})
    exact, rounded = (figures(each)["grad_norm"] for each in (sharded(place), run))
    assert rounded[1] == pytest.approx(exact[1], rel=2**-8)
    assert abs(rounded[1] / exact[1] - 1) > 1e-6  # fp32 would agree to 1e-7
    assert {str(value.dtype) for value in last(run).weights.values()} == {"torch.float32"}


@pytest.mark.slow
def test_weights_gathered_in_bf16_compute_what_autocast_makes_of_them(place: Place) -> None:
    """A Linear rounds its weights to bf16 under autocast anyway, so nothing changes but the messages' size."""
    changes = {"trainer.precision": "bf16", "trainer.max_epochs": 1}
    plain = trained(place, "fsdp-autocast", 2, **changes | {"trainer.fsdp": PARTS})
    small = trained(place, "fsdp-bf16-weights", 2, **changes | {"trainer.fsdp": PARTS | {"param_dtype": "bf16"}})
    same_training(plain, small)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"trainer.fsdp": {"param_dtype": "bf16"}, "trainer.precision": "fp32"}, "bf16 needs trainer.precision: bf16"),
        ({"trainer.fsdp": {"reduce_dtype": "fp16"}}, "'fp32', 'bf16'"),
        ({"trainer.fsdp": {"replicate": "node"}}, "'nodes'"),
    ],
)
def test_what_cannot_be_is_one_message(tmp_path: Path, changes: Any, told: str) -> None:
    path = write_config(tmp_path, "wrong", SETTINGS | changes)
    with pytest.raises(ConfigError) as found:
        check(load_config(path))
    (mistake,) = found.value.mistakes
    assert told in str(mistake)
    assert f"{path}:" in str(mistake)


@pytest.mark.slow
def test_copies_that_do_not_divide_the_ranks_are_refused(place: Place) -> None:
    config = place.config("fsdp-thirds", **SETTINGS | {"trainer.fsdp": {"replicate": 3}})
    done = place.run(config, ranks=2, expect=2)
    assert "trainer.fsdp.replicate: 2 ranks cannot hold 3 copies" in done.stderr
    assert "possible: 1, 2" in done.stderr
