"""Which lines of an error are shown: the user's own, each once."""

from pathlib import Path

import pytest
import torch

from dtrain.reporting import own_frames
from dtrain.reporting.own_frames import frame_lines, in_one_line, place_of_error, warning_line

SOURCE = """\
def collate(samples):
    return [one["image"] for one in samples]
"""


def test_a_comprehension_is_no_second_frame(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(SOURCE)
    names: dict = {}
    exec(compile(SOURCE, str(file), "exec"), names)
    with pytest.raises(TypeError) as failure:
        names["collate"]([(1, 2)])
    own = [line for line in frame_lines(failure.value) if str(file) in line]
    assert own == [f"{file}:2 in collate"]
    assert place_of_error(failure.value) == f"{file}:2 in collate"


def test_what_only_wraps_a_call_is_not_the_place_of_an_error() -> None:
    @torch.no_grad()
    def fails() -> None:
        raise ValueError

    with pytest.raises(ValueError) as failure:
        fails()
    error, file = failure.value, str(Path(__file__))
    assert place_of_error(error).startswith(f"{file}:")
    while error.__traceback__ is not None and error.__traceback__.tb_frame.f_code.co_filename == file:
        error.__traceback__ = error.__traceback__.tb_next
    assert error.__traceback__ is not None, "torch's own decorator is left"
    error.__traceback__.tb_next = None
    assert place_of_error(error) == ""


def test_a_warning_is_one_line_with_its_place_unless_it_is_ours() -> None:
    lib = "/usr/lib/python3/site-packages/lib.py"
    told = warning_line("first\n second", UserWarning, lib, 7, "    warnings.warn(x)")
    assert told == f"warning: first second ({lib}:7)\n"
    assert warning_line(FutureWarning("x"), FutureWarning, lib, 7) == f"FutureWarning: x ({lib}:7)\n"
    engine = str(Path(own_frames.__file__).parents[1] / "checkpoint" / "weights.py")
    assert warning_line("a checkpoint is damaged", UserWarning, engine, 9) == "warning: a checkpoint is damaged\n"


def test_an_error_without_a_message_has_no_colon() -> None:
    assert in_one_line("AssertionError", "") == "AssertionError"
    note = "while loading sample 3 of Points"
    assert in_one_line("KeyError", f"'x'\n{note}") == f"KeyError: 'x' ({note})"
    assert in_one_line("AssertionError", f"\n{note}") == f"AssertionError ({note})"
    assert len(in_one_line("E", "x" * 9000)) == 503
