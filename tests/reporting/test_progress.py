"""What a person sees of a run: on real (pseudo) terminals, in pipes, and on ranks that keep silent."""

import fcntl
import inspect
import io
import math
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from dtrain.reporting import progress as progress_module
from dtrain.reporting import terminal_progress as terminal_module
from dtrain.reporting import time_left as time_left_module
from dtrain.reporting.number_text import count_text, duration_text, figure_text
from dtrain.reporting.progress import Progress
from dtrain.reporting.terminal_progress import TerminalProgress, get_progress

URI = "sqlite:////home/someone/projects/with/a/long/path/that/goes/on/and/on/digits/mlflow.db"
COMMAND = f"mlflow ui --backend-store-uri {URI}"
RUN = f"""
import sys
from dtrain.reporting.terminal_progress import get_progress
progress = get_progress(True)
progress.begin({{"model": "ViT, 68,970 parameters", "rate": "0.003 [not markup] :smile:", "MLflow": {URI!r}}})
step = 0
for epoch in range(1, 4):
    progress.start_epoch(epoch, 3, 20)
    for _ in range(20):
        step += 1
        progress.step()
        if step % 10 == 0:
            progress.figures(step, {{"train/loss": 2 / step, "lr": 1e-3, "samples_per_second": 12345.6}})
        if step == 30:
            print("the model's own print")
            print("the model's own complaint", file=sys.stderr)
            progress.note("warning: [bold] no checkpoint of step 30 :wave:")
    progress.evaluation("val", step, {{"val/loss": 1 / step, "val/Accuracy": step / 61}}, best=True)
    progress.end_epoch()
progress.evaluation("test", step, {{"test/loss": 0.12, "test/Accuracy": 0.9852}})
progress.summary({{"best": "val/Accuracy 0.9836", "MLflow": {COMMAND!r}}})
progress.close()
"""
STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  "


class Screen(NamedTuple):
    """A terminal after a program has ended.

    Attributes:
        lines: What stands there, top to bottom, trailing blanks removed.
        raw: All that was written, control codes included.
        stderr: Standard error, where it was not the terminal.
        rc: The program's exit status.
    """

    lines: list[str]
    raw: str
    stderr: str
    rc: int


def folded(lines: list[list[str]], columns: int, row: int, column: int) -> tuple[list[list[str]], int, int]:
    """Lines in a narrower terminal, and where the cursor is then."""
    folds = [range(0, max(1, len(line)), columns) for line in lines]
    rows = [line[at : at + columns] for line, each in zip(lines, folds, strict=True) for at in each]
    return rows, sum(map(len, folds[:row])) + column // columns, column % columns


def erase(lines: list[list[str]], row: int, column: int, what: str) -> None:
    assert what in ("K2", "J"), "erased are whole lines, or all from the cursor on"
    if what == "K2":
        lines[row] = []
    else:
        lines[row:] = [lines[row][:column]]


def shown(raw: str, columns: int, narrowed: tuple[int, int] = (-1, 0)) -> list[str]:
    """The lines a terminal shows for a text with carriage returns, line feeds, cursor up, erase line and colours.

    At the place `narrowed[0]` of the text it is made narrower, and folds its lines as tmux, VTE and kitty do.
    """
    lines: list[list[str]] = [[]]
    row = column = 0
    for match in re.finditer(r"\x1b\[([?\d;]*)([A-Za-z])|(.)", raw, re.DOTALL):
        if match.start() == narrowed[0]:
            columns = narrowed[1]
            lines, row, column = folded(lines, columns, row, column)
        argument, code, letter = match.groups()
        if code == "A":
            row = max(0, row - int(argument or 1))
        elif code in ("K", "J"):
            erase(lines, row, column, code + argument)
        elif code in ("m", "h", "l"):
            continue
        elif code:
            pytest.fail(f"a control code that this terminal does not know: {match[0]!r}")
        elif letter == "\r":
            column = 0
        elif letter == "\n" or column == columns:
            row, column = row + 1, 0
            lines += [[] for _ in range(row + 1 - len(lines))]
        if letter and letter not in "\r\n":
            lines[row] += " " * (column + 1 - len(lines[row]))
            lines[row][column] = letter
            column += 1
    return ["".join(line).rstrip() for line in lines]


def plain(raw: str) -> str:
    """A text without its control codes."""
    return re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", raw)


def on_terminal(code: str, columns: int = 80, stderr_elsewhere: bool = False, **env: str) -> Screen:
    """Runs Python code on a terminal of its own, so wide and 40 lines high."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    kept = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.PIPE if stderr_elsewhere else theirs,
        cwd=Path(__file__).parents[2],
        env={**kept, "TERM": "xterm-256color", "PYTHONUTF8": "1", **env},
    )
    os.close(theirs)
    raw, end = b"", time.monotonic() + 250
    while time.monotonic() < end:
        if select.select([ours], [], [], 1)[0]:
            try:
                raw += os.read(ours, 65536)
            except OSError:  # the last one who had it open is gone
                break
    os.close(ours)
    process.kill()
    stderr = process.communicate(timeout=200)[1]
    text = raw.decode()
    return Screen(shown(text, columns), text, (stderr or b"").decode(), process.returncode)


@pytest.fixture(scope="module")
def screen() -> Screen:
    """The whole run on an ordinary terminal."""
    return on_terminal(RUN)


class Terminal(io.StringIO):
    """A stream that takes itself for a terminal."""

    def isatty(self) -> bool:
        return True

    def rows(self) -> list[str]:
        return [line for line in shown(self.getvalue().replace("\n", "\r\n"), 1000) if line]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    return Terminal()


def opened(terminal: Terminal) -> TerminalProgress:
    bar = get_progress(True, terminal)
    assert isinstance(bar, TerminalProgress)
    return bar


# On a terminal


def test_the_facts_stand_in_a_frame_and_long_ones_are_folded(screen: Screen) -> None:
    top, bottom = (next(n for n, line in enumerate(screen.lines) if line.startswith(corner)) for corner in "╭╰")
    frame = screen.lines[top : bottom + 1]
    assert {len(line) for line in frame} == {80}
    inside = [line.strip("│").strip() for line in frame[1:-1]]
    assert inside[0] == "model   ViT, 68,970 parameters"
    assert inside[1] == "rate    0.003 [not markup] :smile:"
    assert "".join(inside[2:]).removeprefix("MLflow").strip() == URI


def test_every_epoch_leaves_one_row_under_one_header(screen: Screen) -> None:
    assert [line.split() for line in screen.lines if line.startswith("epoch")] == [
        ["epoch", "step", "loss", "val/loss", "val/Accuracy", "samples/s", "time"]
    ]
    rows = [line.split() for line in screen.lines if re.match(r"\s+\d/3 ", line)]
    assert [row[:6] for row in rows] == [
        ["1/3", "20", "0.1000", "0.0500", "0.3279", "12.3k"],
        ["2/3", "40", "0.0500", "0.0250", "0.6557", "12.3k"],
        ["3/3", "60", "0.0333", "0.0167", "0.9836", "12.3k"],
    ]
    assert [row[-1] for row in rows] == ["best"] * 3
    header, *table = (line for line in screen.lines if re.match(r"\s+\d/3 |epoch ", line))
    end = header.index("val/Accuracy") + len("val/Accuracy")
    assert [line[:end].split()[-1] for line in table] == ["0.3279", "0.6557", "0.9836"], "figures under their names"


def test_the_bar_was_there_and_is_gone_at_the_end(screen: Screen) -> None:
    assert "━" in screen.raw
    assert not [line for line in screen.lines if "━" in line or re.search(r" \d+/20 ", line)]


def test_prints_complaints_and_notes_stand_above_the_bar_in_order(screen: Screen) -> None:
    wanted = ["the model's own print", "the model's own complaint", "warning: [bold] no checkpoint of step 30 :wave:"]
    assert [line for line in screen.lines if line in wanted] == wanted
    first_row, second_row = (screen.lines.index(line) for line in screen.lines if re.match(r"\s+[12]/3 ", line))
    assert first_row < screen.lines.index(wanted[0]) < second_row


def test_the_test_figures_are_a_line(screen: Screen) -> None:
    assert "test  loss 0.1200  Accuracy 0.9852" in screen.lines


def test_a_long_command_in_the_summary_can_be_copied_in_one_piece(screen: Screen) -> None:
    assert f"{COMMAND}\r\n" in screen.raw
    assert any(re.fullmatch(r"│ best  val/Accuracy 0\.9836 +│", line) for line in screen.lines)


def test_nothing_but_the_command_is_wider_than_the_terminal() -> None:
    for columns in (40, 60, 80, 200):
        screen = on_terminal(RUN, columns)
        assert [
            line for line in re.split(r"[\r\n]+", plain(screen.raw)) if len(line) > columns and line != COMMAND
        ] == []
        assert len([line for line in screen.lines if re.match(r"\s+\d/3 ", line)]) == 3


def test_redirected_errors_stay_where_the_user_sent_them() -> None:
    screen = on_terminal(RUN, stderr_elsewhere=True)
    assert screen.stderr == "the model's own complaint\n"
    assert "complaint" not in screen.raw


def test_no_color_is_respected() -> None:
    def colours(raw: str) -> list[str]:
        codes = [code for group in re.findall(r"\x1b\[([\d;]*)m", raw) for code in group.split(";")]
        return [code for code in codes if code.isdigit() and 30 <= int(code) <= 107]

    uncoloured = on_terminal(RUN, NO_COLOR="1").raw
    assert colours(uncoloured) == []
    assert re.search("epoch 1/3 ━*─+ ", plain(uncoloured)), (
        "the rest of the bar differs from its beginning without colours, too"
    )
    assert colours(on_terminal(RUN).raw) != []


@pytest.mark.parametrize("name", ["dumb", "unknown", ""])
def test_a_terminal_that_cannot_redraw_gets_plain_lines(name: str) -> None:
    screen = on_terminal(RUN, TERM=name)
    assert "\x1b" not in screen.raw
    unstamped = [line for line in screen.raw.splitlines() if not re.match(STAMP, line)]
    assert unstamped == ["the model's own print", "the model's own complaint"]


def test_a_killed_process_leaves_the_cursor_visible() -> None:
    code = RUN.replace("if step == 30:", "if step == 30:\n            import os; os.kill(os.getpid(), 9)")
    screen = on_terminal(code)
    assert screen.rc == -signal.SIGKILL
    assert re.findall(r"\x1b\[\?25([hl])", screen.raw)[-1] == "h"


def test_a_terminal_without_unicode_gets_a_bar_of_ascii() -> None:
    screen = on_terminal(RUN, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert screen.rc == 0
    assert screen.raw.isascii()
    assert re.search("epoch 1/3 =*-+ ", plain(screen.raw))


def test_it_redraws_at_most_twice_a_second(terminal: Terminal) -> None:
    bar = opened(terminal)
    began = time.perf_counter()
    bar.start_epoch(1, 1, 30_000)
    for _ in range(30_000):
        bar.step()
    drawn = terminal.getvalue().count("epoch 1/1")
    seconds = time.perf_counter() - began
    bar.close()
    assert 1 <= drawn <= 1 + seconds / progress_module.REFRESH_SECONDS


def test_the_bar_shows_loss_speed_metric_and_time_left(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "REFRESH_SECONDS", 0.0)
    monkeypatch.setenv("COLUMNS", "120")
    bar = opened(terminal)
    bar.start_epoch(2, 3, 1200, done=599)
    bar.evaluation("val", 1799, {"val/loss": 0.4, "val/Accuracy": 0.9})
    bar.step()
    bar.figures(1800, {"train/loss": 0.3, "lr": 1e-3, "samples_per_second": 12345.6})
    bar.step()
    last = terminal.rows()[-1]
    assert re.fullmatch(
        r"epoch 2/3 ━+─+   601/1,200  loss 0\.3000  12\.3k samples/s  Accuracy 0\.9000  .*  [\d.]+ \w+( \d+ \w+)? left",
        last.replace("val/", ""),
    )
    assert last.count("━") in range(last.count("─") - 1, last.count("─") + 2), "half of the epoch is done"
    bar.close()


def test_a_full_bar_says_that_it_evaluates(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "REFRESH_SECONDS", 0.0)
    bar = opened(terminal)
    bar.start_epoch(1, 1, 1)
    bar.step()
    assert re.search(r"━ 1/1 .*evaluating$", terminal.rows()[-1])
    bar.close()


def test_a_terminal_that_is_made_narrower_shows_one_bar(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "REFRESH_SECONDS", 0.0)
    bar = opened(terminal)
    bar.note("above")
    bar.start_epoch(1, 1, 3)
    bar.step()
    at = len(terminal.getvalue().replace("\n", "\r\n"))
    assert len(shown(terminal.getvalue().replace("\n", "\r\n"), 80)[-1]) > 40
    bar._console.width = 40
    bar.note("between")
    bar.step()
    rows = shown(terminal.getvalue().replace("\n", "\r\n"), 80, narrowed=(at, 40))
    assert rows[:2] == ["above", "between"] and re.match(r"epoch 1/1 ━+─+ 2/3", rows[2]) and len(rows) == 3, rows
    bar.close()


def test_what_is_waited_for_after_the_first_step_stands_in_the_bar_and_not_in_the_time_left(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    for module in (time_left_module, terminal_module, progress_module):
        monkeypatch.setattr(module, "perf_counter", lambda: now[0])
    monkeypatch.setattr(progress_module, "REFRESH_SECONDS", 0.0)
    bar = opened(terminal)
    bar.start_epoch(1, 1, 100)
    assert terminal.rows()[-1].endswith("first batch"), "at once: it may be long in coming"
    bar.step()
    bar.waits_for("making the metrics")
    now[0] += 60
    bar._live.refresh()
    assert re.search(r"1/100  making the metrics \.\.\. 1 min 00 s$", terminal.rows()[-1])
    bar.waits_for("")
    assert bar._ticks is None and bar._live.is_started
    bar.step()
    now[0] += 1
    bar.step()
    assert terminal.rows()[-1].endswith("1 min 37 s left"), "97 steps of a second"
    bar.close()


def test_an_address_longer_than_a_line_is_left_in_one_piece(terminal: Terminal) -> None:
    bar, address = opened(terminal), "http://127.0.0.1:5000/" + 40 * "runs/"
    bar.note(f"this run in MLflow: {address}")
    bar.close()
    assert f"this run in MLflow: {address}\n" in terminal.getvalue()


def test_epochs_without_validation_have_rows_too(terminal: Terminal) -> None:
    bar = opened(terminal)
    for epoch in (1, 2):
        bar.start_epoch(epoch, 2, 1)
        bar.step()
        bar.figures(epoch, {"train/loss": 0.5})
        bar.end_epoch()
    bar.close()
    assert [row.split()[:3] for row in terminal.rows()[1:]] == [["1/2", "1", "0.5000"], ["2/2", "2", "0.5000"]]


def test_a_validation_after_the_epochs_end_joins_its_row(terminal: Terminal) -> None:
    bar = opened(terminal)
    bar.start_epoch(1, 2, 1)
    bar.step()
    bar.end_epoch()
    bar.evaluation("val", 1, {"loss": 0.25})
    bar.close()
    assert [row.split()[:3] for row in terminal.rows()[1:]] == [["1/2", "1", "0.2500"]]


def test_validations_within_an_epoch_say_how_far_it_was(terminal: Terminal) -> None:
    bar = opened(terminal)
    bar.start_epoch(2, 3, 4)
    for step in range(1, 5):
        bar.step()
        if step % 2 == 0:
            bar.evaluation("val", 4 + step, {"val/loss": 0.5})
    bar.end_epoch()
    bar.close()
    assert [row.split()[0] for row in terminal.rows()[1:]] == ["1.5/3", "2/3"]


def test_more_metrics_than_fit_leave_the_first_ones(terminal: Terminal) -> None:
    bar = opened(terminal)
    bar.start_epoch(1, 1, 1)
    bar.step()
    bar.evaluation("val", 1, {"val/loss": 0.5} | {f"val/Accuracy_{n}": n / 100 for n in range(100)}, best=True)
    bar.close()
    header, row = terminal.rows()
    assert len(header) <= 80
    assert header.split()[:4] == ["epoch", "val/loss", "val/Accuracy_0", "val/Accuracy_1"]
    shown = len([name for name in header.split() if "/" in name])
    assert header.split()[-2:] == [f"+{101 - shown}", "more"]
    assert row.split()[0] == "1/1" and row.split()[-1] == "best"


def test_the_monitored_figure_comes_first_and_classes_are_folded(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    bar = opened(terminal)
    bar.begin({"model": "Net"}, monitor="val/F1")
    bar.start_epoch(1, 2, 1)
    bar.step()
    bar.figures(1, {"train/loss": 0.5})
    classes = {"val/F1_0": 0.99, "val/F1_1": 0.99, "val/F1_2": 0.81}
    bar.evaluation("val", 1, {"val/loss": 0.5, "val/loss_dice": 0.2, "val/F1": 0.93, **classes})
    bar.start_epoch(2, 2, 1)
    bar.step()
    bar.end_epoch()  # without a validation
    bar.close()
    header, row, other = terminal.rows()[-3:]
    assert header.split() == ["epoch", "step", "val/F1", "loss", "val/loss", "val/loss_dice", "time"]
    assert row.split()[:6] == ["1/2", "1", "0.93", "(0.81-0.99)", "0.5000", "0.5000"]
    assert header.index("loss") + len("loss") == other.index("0.5000") + len("0.5000"), "under its name"


def test_an_epoch_that_is_stopped_is_no_row(terminal: Terminal) -> None:
    bar = opened(terminal)
    bar.start_epoch(1, 500, 5)
    bar.step()
    bar.end_epoch()
    bar.close()
    assert [row for row in terminal.rows() if "/500" in row] == []


def test_a_figure_that_is_not_finite_is_shown(terminal: Terminal) -> None:
    bar = opened(terminal)
    bar.start_epoch(1, 1, 1)
    bar.step()
    bar.evaluation("val", 1, {"val/loss": math.nan})
    bar.close()
    assert "nan" in terminal.rows()[1]


def test_close_gives_standard_output_back(monkeypatch: pytest.MonkeyPatch, terminal: Terminal) -> None:
    monkeypatch.setattr(sys, "stdout", terminal)
    bar = get_progress(True)
    bar.start_epoch(1, 1, 1)
    assert sys.stdout is not terminal
    bar.close()
    bar.close()
    assert sys.stdout is terminal


def test_what_comes_after_a_wait_does_not_wait_for_the_line_that_named_it(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal_module, "REFRESH_SECONDS", 1e6)  # for which the thread would sleep now
    bar = opened(terminal)
    bar.waits_for("building the model")
    bar.waits_for("")
    assert bar._ticks is None
    bar.waits_for("making the metrics")
    bar.close()
    assert (
        terminal.getvalue().count("building the model ...") == terminal.getvalue().count("making the metrics ...") == 1
    )


def test_what_is_waited_for_is_named_until_the_table_is_there(terminal: Terminal) -> None:
    bar = opened(terminal)
    bar.waits_for("importing PyTorch")
    bar.waits_for("building the model")
    bar.note("a note above it")
    bar.begin({"model": "Net"})
    assert bar._ticks is None, "no thread is left where workers may be forked"
    bar.start_epoch(1, 1, 2)
    bar.close()
    assert re.search(r"importing PyTorch \.\.\. \d", terminal.getvalue()) and "first batch" in terminal.getvalue()
    assert not [row for row in terminal.rows() if "..." in row]
    assert "a note above it" in terminal.rows()


# In a pipe or a batch log


def piped(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env=dict(os.environ) | env,
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_a_pipe_gets_one_plain_line_per_event() -> None:
    done = piped(RUN + "\nassert 'rich' not in sys.modules")
    assert (done.returncode, done.stderr) == (0, "the model's own complaint\n")
    lines = done.stdout.splitlines()
    assert [line for line in lines if not re.match(STAMP, line)] == ["the model's own print"]
    texts = [re.sub(STAMP, "", line) for line in lines]
    assert f"MLflow: {URI}" in texts
    assert "epoch 1/3  step 10  loss 0.2000  lr 0.001  12.3k samples/s" in texts
    assert len([text for text in texts if re.match(r"epoch \d/3  step \d+  loss .*\d \w+ left$", text)]) == 5
    assert "val  step 40  loss 0.0250  Accuracy 0.6557  best so far" in texts
    assert "test  step 60  loss 0.1200  Accuracy 0.9852" in texts
    assert texts[-2:] == ["best: val/Accuracy 0.9836", f"MLflow: {COMMAND}"]


def test_a_note_of_several_lines_has_a_stamp_on_each(capsys: pytest.CaptureFixture[str]) -> None:
    get_progress(True).note("one\ntwo")
    assert re.fullmatch(f"{STAMP}one\n{STAMP}two\n", capsys.readouterr().out)


def test_each_line_is_out_before_the_next_step(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as stream:
        get_progress(True, stream).note("seen at once")
        assert (tmp_path / "log").read_text().endswith("seen at once\n")


def test_without_a_number_of_epochs_the_epochs_end_is_foreseen() -> None:
    stream = io.StringIO()
    lines = get_progress(True, stream)
    lines.start_epoch(4, None, 10)
    for step in (1, 2):
        lines.step()
        lines.figures(step, {})
    assert re.search(r"  epoch 4  step 2  epoch ends in [\d.]+ s\n$", stream.getvalue())


def test_a_reader_that_goes_away_does_not_end_the_run() -> None:
    # Time for the reader to go; what the model prints itself must not fail then either.
    code = RUN.replace("for epoch in", "import time; time.sleep(0.3)\nfor epoch in")
    code = code.replace("progress.close()", "print('trained to the end', file=sys.stderr)")
    command = f'"{sys.executable}" -c "$CODE" | head -n 1; exit "${{PIPESTATUS[0]}}"'
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=Path(__file__).parents[2],
        env={key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"} | {"CODE": code},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0
    assert done.stderr.splitlines() == ["the model's own complaint", "trained to the end"]


def test_a_full_disk_does_not_end_the_run() -> None:
    with open("/dev/full", "w") as stream:
        lines = get_progress(True, stream)
        lines.note("lost")
        lines.evaluation("val", 1, {"val/loss": 0.5})
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # else closing the stream fails


def test_a_closed_stream_does_not_end_the_run(tmp_path: Path) -> None:
    stream = (tmp_path / "log").open("w")
    lines = get_progress(True, stream)
    stream.close()
    lines.note("lost")


def test_letters_that_the_encoding_lacks_are_escaped() -> None:
    code = "from dtrain.reporting.terminal_progress import get_progress; get_progress(True).note('größe')"
    done = piped(code, PYTHONIOENCODING="ascii")
    assert re.fullmatch(STAMP + r"gr\\xf6\\xdfe\n", done.stdout)


# On the other ranks


def test_other_ranks_show_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    done = piped(RUN.replace("get_progress(True)", "get_progress(False)"))
    assert done.stdout == "the model's own print\n"
    stream = Terminal()
    progress = get_progress(False, stream)
    progress.note("unheard")
    assert stream.getvalue() == ""


# Both at once


def test_a_copy_has_the_lines_while_it_lasts(terminal: Terminal) -> None:
    bar, copy = opened(terminal), io.StringIO()
    bar.note("before")
    with bar.copied_to(copy):
        bar.begin({"model": "ViT"})
        bar.start_epoch(1, 2, 2)
        for step in (1, 2):
            bar.step()
            bar.figures(step, {"train/loss": 0.5})
        bar.evaluation("val", 2, {"val/loss": 0.25}, best=True)
        bar.end_epoch()
        bar.summary({"best": "val/loss 0.25"})
    bar.note("after")
    bar.close()
    texts = [re.sub(STAMP, "", line) for line in copy.getvalue().splitlines()]
    assert texts[:2] == ["model: ViT", "epoch 1/2  step 1  loss 0.5000"]
    assert re.fullmatch(r"epoch 1/2  step 2  loss 0\.5000  [\d.]+ \w+( \d+ \w+)? left", texts[2])
    assert texts[3:] == ["val  step 2  loss 0.2500  best so far", "best: val/loss 0.25"]
    shown = terminal.getvalue()
    assert all(text in shown for text in ("before", "after", "1/2", "best"))


def test_a_copy_ends_with_an_error_too() -> None:
    progress, copy = get_progress(False), io.StringIO()
    with pytest.raises(KeyboardInterrupt), progress.copied_to(copy):
        progress.note("heard")
        raise KeyboardInterrupt
    progress.note("unheard")
    assert re.fullmatch(f"{STAMP}heard\n", copy.getvalue())


def test_both_kinds_have_the_same_methods() -> None:
    def methods(kind: type) -> dict[str, inspect.Signature]:
        members = inspect.getmembers(kind, inspect.isfunction)
        return {name: inspect.signature(method) for name, method in members if not name.startswith("_")}

    assert methods(Progress) == methods(TerminalProgress)


# Numbers


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (68_946, "68.9k"),
        (0.25, "0.25"),
        (0.00412, "0.00412"),
        (999.4, "999"),
        (999.6, "1k"),
        (12_345.6, "12.3k"),
        (1.234e6, "1.23M"),
        (math.nan, "nan"),
    ],
)
def test_counts(count: float, text: str) -> None:
    assert count_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (4.1, "4.1 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (65, "1 min 05 s"),
        (3599.7, "1 h 00 min"),
        (3725, "1 h 02 min"),
        (2 * 86400 + 3 * 3600, "2 d 03 h"),
        (math.inf, "?"),
        (math.nan, "?"),
        (-1, "0.0 s"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.31239, "0.3124"),
        (2.302585, "2.3026"),
        (12.34567, "12.346"),
        (-123.4567, "-123.46"),
        (12345.6, "12346"),
        (123456.0, "1.235e+05"),
        (0.0123, "0.0123"),
        (0.00093, "9.300e-04"),
        (0, "0.0"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        (None, "None"),
    ],
)
def test_figures(value: float, text: str) -> None:
    assert figure_text(value) == text
