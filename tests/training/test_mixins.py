"""`trainer.name` as a list: classes that become one."""

import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from whole_runs import Place, equal, figures, last

from dtrain.config.errors import ConfigError

pytestmark = pytest.mark.timeout(600)

WRONG = '''
from dtrain.trainer import Trainer


class Own(Trainer):
    def training_step(self, batch):
        return self.forward(self.model, batch)[0]


class Doubled(Trainer):
    """Minimises twice the loss."""

    def training_step(self, batch):
        result = super().training_step(batch)
        return 2 * (result[0] if isinstance(result, tuple) else result)


class Derived(Own):
    pass


class Closed(Trainer):
    def __init__(self, parts, *, own=1):
        super().__init__(parts)


class Plain:
    """No Trainer itself."""

    def log(self):
        self.lines = getattr(self, "lines", 0) + 1
        super().log()


class Stranger:
    pass


def function():
    pass
'''
PAGE = (REPOSITORY / "docs" / "own-loop.md").read_text()
EXTENSIONS = re.search(r"^```python\n(# file: my_extensions.py\n.*?)^```$", PAGE, re.M | re.S)


@pytest.fixture
def train(here: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    (tmp_path / "combined.py").write_text(WRONG)
    monkeypatch.delitem(sys.modules, "combined", raising=False)
    plain: dict[str, Any] = {"modules": ["combined", "toy"], "trainer.pictures": False, "trainer.max_steps": 2}
    return lambda name, **changes: here(name, **plain | changes)


def test_two_extensions_work_together_and_resume(place: Place) -> None:
    """Four of eight steps, in the docs' order; by hand: decay, and the norms of a part before clipping."""
    assert EXTENSIONS is not None
    place.write("my_extensions.py", EXTENSIONS[1])
    own = {"name": ["GradientStatistics", "DecaySchedule"], "decay_end": 0.4, "decay_steps": 10, "clip_grad_norm": 1e-3}
    settings: dict[str, Any] = {f"trainer.{key}": value for key, value in own.items()} | {"trainer.pictures": False}
    settings |= {"modules": ["my_extensions", "toy"], "model": {"name": "MLP", "dropout": 0.2}, "loaders.batch_size": 2}
    settings["optimizer"] = {"name": "AdamW", "lr": 0.01, "weight_decay": 0.1}
    whole, parts = place.config("mixed-whole", **settings), place.config("mixed-parts", **settings)
    place.run(whole, "trainer.max_steps=8", ranks=2)
    place.run(parts, "trainer.max_steps=4", ranks=2)
    place.run(parts, "trainer.max_steps=8", ranks=2)
    one, other = last(place.path("mixed-whole")), last(place.path("mixed-parts"))
    assert equal(one.weights, other.weights) and equal(one.state["optimizer"], other.state["optimizer"])
    (group,) = one.state["optimizer"]["param_groups"]
    assert group["weight_decay"] == pytest.approx(0.1 + 0.3 * (1 - math.cos(math.pi * 0.7)) / 2)
    logged = figures(place.path("mixed-whole"))
    assert logged["train/gradient/layers"] == logged["grad_norm"]  # the whole model is in that part
    assert all(value > 1e-2 for value in logged["train/gradient/layers"].values())


@pytest.mark.slow
def test_the_first_of_the_list_is_the_outermost(train: Callable[..., Path]) -> None:
    run = train("outermost", **{"trainer.name": ["Plain", "Doubled", "Own"]})
    plain = train("innermost", **{"trainer.name": "Own"})
    one, other = figures(run)["train/loss"][1], figures(plain)["train/loss"][1]
    assert one == pytest.approx(2 * other)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["Own", "Doubled"],
            r"name\.0: Own.training_step calls no super\(\), .* Doubled is never called; put D",
        ),
        (["Own", "Derived"], r"name\.0: Own stands before Derived, which derives from it; .* must stand behind it"),
        (["Trainer", "Doubled"], r"name\.0: Trainer stands before Doubled, which derives from it"),
        (["Doubled", "Plain"], r"name\.0: Plain stands behind Doubled, so that its methods are never called"),
        (["Stranger"], r"name\.0: Stranger is not a mixin: it is not a Trainer, and overrides no method of it"),
        (
            ["Doubled", "Closed"],
            r"name\.1: Closed takes no settings but its own; .*__init__\(self, parts, \*, ",
        ),
        (["Doubled", "function"], r"name\.1: is a function; expected a class"),
        (["Doubled", "Doubled"], r"name\.0: Doubled is listed twice"),
        (["Doubled", "Duobled"], r"name\.1: there is no 'Duobled'; did you mean"),
        ([], r"trainer\.name: expected the name of a class or a function, found"),
    ],
)
def test_classes_that_do_not_combine_are_refused(names: list[str], message: str, train: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=message):
        train("refused", **{"trainer.name": names})


@pytest.mark.slow
def test_a_setting_that_none_of_them_takes_is_refused(train: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.doubble: .*unexpected argument 'doubble'"):
        train("refused", **{"trainer.name": ["Plain", "Doubled"], "trainer.doubble": 1})
