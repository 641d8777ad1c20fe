"""How far the figures of earlier starts came, read without parsing most of a long journal."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from dtrain.tracking import earlier_starts
from dtrain.tracking.earlier_starts import read_earlier


def line(kind: str, **fields: Any) -> bytes:
    """As `Journal` writes it."""
    return json.dumps({"kind": kind, "time": 1764428400.25, **fields}, allow_nan=False).encode() + b"\n"


def lived(seed: int) -> list[bytes]:
    """The journal of a training with several starts, some of which went back; sets of figures come and go."""
    draw = random.Random(seed)
    names = ["train/loss", "lr", "step", 'of "a"', "a\\\\", "größe", "val/loss", "}\n", "values"]
    lines, step = [line("start", attempt=1, from_step=None, facts={}), line("tags", values={"a": "b"})], 0
    figures: list[Any] = [0.25, 1e-05, -3.0, 1.5e300, "nan", "-inf", 7]
    for attempt in range(2, draw.randrange(3, 6)):
        forms = [draw.sample(names, draw.randrange(1, 5)) for _ in range(4)]
        for _ in range(draw.randrange(60)):
            step += draw.randrange(1, 3)
            lines.append(line("metrics", step=step, values={key: draw.choice(figures) for key in draw.choice(forms)}))
            if draw.random() < 0.1:
                step += 1
                lines.append(line("image", path="pictures/a.png", key=draw.choice(names), step=step))
            if draw.random() < 0.05:
                lines.append(draw.choice([b"\n", b"{}\n", b'{"kind": "met\n', b"\x00\x00\n", lines[-1][:-4] + b"\n"]))
        back = draw.choice([None, step // 2])
        lines.append(line("start", attempt=attempt, from_step=back, facts={}))
        step = step if back is None else back
    return lines


def by_hand(lines: list[bytes]) -> tuple[int, dict[str, int]]:
    """The same, line by line."""
    attempt, steps = 1, {}
    for each in lines:
        try:
            entry = json.loads(each)
        except ValueError:
            continue
        attempt += entry.get("kind") == "start"
        if entry.get("from_step") is not None:
            steps = {key: min(last, entry["from_step"]) for key, last in steps.items()}
        keys = {"metrics": entry.get("values", ()), "image": [entry.get("key")]}.get(entry.get("kind"), ())
        steps |= {key: max(entry["step"], steps.get(key, 0)) for key in keys}
    return attempt, steps


@pytest.mark.parametrize("block", [1, 700, 2**20])
def test_the_last_steps_are_those_that_parsing_each_line_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(earlier_starts, "_BLOCK_BYTES", block)
    for seed in range(12):
        lines = lived(seed)
        (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines))
        assert read_earlier(tmp_path / "metrics.jsonl") == by_hand(lines), seed


def test_more_forms_of_lines_than_are_looked_for_are_read_as_well(tmp_path: Path) -> None:
    lines = [line("metrics", step=step, values={f"figure/{step % 90}": 0.5}) for step in range(1, 400)]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines))
    assert read_earlier(tmp_path / "metrics.jsonl") == by_hand(lines)


@pytest.mark.parametrize(
    "torn", [b"", b"{", b'{"kind": "metrics", "time": 1.5, "step": 901, "values": {"train/loss": 0.5}}']
)
def test_a_torn_last_line_is_cut_off(tmp_path: Path, torn: bytes) -> None:
    whole = b"".join(line("metrics", step=step, values={"train/loss": 0.5}) for step in range(1, 901))
    (tmp_path / "metrics.jsonl").write_bytes(whole + torn)
    assert read_earlier(tmp_path / "metrics.jsonl") == (1, {"train/loss": 900})
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole


def test_of_a_long_journal_few_lines_are_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsing each line of a journal of a million would take a resume ten seconds and more."""
    parsed: list[bytes] = []
    read_line = earlier_starts.read_line
    monkeypatch.setattr(earlier_starts, "read_line", lambda text: parsed.append(text) or read_line(text))
    train, val = {"train/loss": 0.125, "learning_rate": 1e-05}, {"val/loss": 0.25, "val/accuracy": "nan"}
    lines = [line("metrics", step=step, values=val if step % 50 == 0 else train) for step in range(1, 20_001)]
    (tmp_path / "metrics.jsonl").write_bytes(line("start", attempt=1, from_step=None, facts={}) + b"".join(lines))
    expected = dict.fromkeys(train, 19_999) | dict.fromkeys(val, 20_000)
    assert read_earlier(tmp_path / "metrics.jsonl") == (2, expected)
    blocks = (tmp_path / "metrics.jsonl").stat().st_size // 2**20 + 1
    assert len(parsed) <= 4 + 2 * blocks, "the start, first lines of each form, and its last in each block"
