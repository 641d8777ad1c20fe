"""What a step costs, counted: no clock decides, and a rise is named."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import neutral_env
from whole_runs import forked_from, worlds_of

TESTS = Path(__file__).parent.parent
# Python functions of dtrain's own in one step, loading included; who raises one says why a step must be dearer.
OWN_CALLS = {"plain": 45, "workers": 45, "clipping": 47, "accumulation": 74, "averaged": 47, "plain on 2 ranks": 46}
MORE_CALLS, MORE_OPERATORS = -20, 0  # than by hand: fewer, since no profiler is told of each step


def counts(tmp_path: Path, kind: str, ranks: int) -> dict[str, Any]:
    """What one step calls, of the rank that calls most of its own."""
    env = neutral_env() | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}", "OMP_NUM_THREADS": "1"}
    worlds = worlds_of(ranks) if ranks > 1 else [{}]
    words = ["-m", "step_counts", kind, str(tmp_path)]
    logs = [tmp_path / f"rank-{rank}.log" for rank in range(ranks)]
    started = [
        forked_from().start(words, tmp_path, env | world, log, log.with_suffix(".err"))
        for world, log in zip(worlds, logs, strict=True)
    ]
    assert [each.wait(200) for each in started] == [0] * ranks, logs[0].with_suffix(".err").read_text()
    found = [json.loads((tmp_path / f"counts-{rank}.json").read_text()) for rank in range(ranks)]
    return max(found, key=lambda each: sum(each["dtrain"]["own"].values()))


def more(one: dict[str, int], other: dict[str, int]) -> str:
    """What is more often in one than in the other, in words."""
    return ", ".join(f"{count} {name}" for name, count in (Counter(one) - Counter(other)).items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", OWN_CALLS)
def test_a_step_calls_no_more_than_its_budget(tmp_path: Path, kind: str) -> None:
    name, _, ranks = kind.partition(" on ")
    found = counts(tmp_path, name, int(ranks.split()[0]) if ranks else 1)
    dtrain, hand = found["dtrain"], found["hand"]
    total = {part: sum(dtrain[part].values()) - sum(hand[part].values()) for part in ("calls", "operators")}
    own = sum(dtrain["own"].values())
    assert 15 < own <= OWN_CALLS[kind], f"{own} calls of its own: {more(dtrain['own'], {})}"
    assert total["calls"] <= MORE_CALLS, f"more than by hand: {more(dtrain['calls'], hand['calls'])}"
    assert total["operators"] <= MORE_OPERATORS, f"more than by hand: {more(dtrain['operators'], hand['operators'])}"
    assert hand["operators"]["aten.addmm.default"] == dtrain["operators"]["aten.addmm.default"] >= 2
