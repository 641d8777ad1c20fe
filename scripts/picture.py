"""Draws docs/run.svg: trains the digits in a real terminal and records what it shows.

python scripts/picture.py [--folder EMPTY_FOLDER] [--output docs/run.svg]

Needs tmux, and torchrun in PATH. The folder is where the run goes; its path is to be read in the picture.
"""

import argparse
import os
import re
import shutil
import subprocess
import tempfile
import time
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
COMMAND = "torchrun --nproc_per_node=2 -m dtrain configfiles/digits.yaml trainer.max_epochs=12"
COLUMNS, ROWS = 92, 80
TIMEOUT_SECONDS = 300
PROMPT = "$ "
FONTS = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
THEME = TerminalTheme(
    (13, 17, 23),
    (201, 209, 217),
    [(72, 79, 88), (255, 123, 114), (63, 185, 80), (210, 153, 34),
     (88, 166, 255), (188, 140, 255), (57, 197, 207), (177, 186, 196)],
    [(110, 118, 129), (255, 161, 152), (86, 211, 100), (227, 179, 65),
     (121, 192, 255), (210, 168, 255), (86, 212, 221), (240, 246, 252)],
)  # fmt: skip


class Terminal:
    """A terminal that nobody looks at."""

    def __init__(self, folder: Path) -> None:
        self.tmux = ["tmux", "-L", f"picture-{os.getpid()}", "-f", "/dev/null"]
        # As scripts/quickstart.sh does: torchrun warns when it has to choose the number of threads.
        shell = f"env PS1='{PROMPT}' TERM=xterm-256color OMP_NUM_THREADS=1 bash --norc --noprofile"
        size = ["-x", str(COLUMNS), "-y", str(ROWS)]
        subprocess.run([*self.tmux, "new-session", "-d", *size, "-c", folder, shell], check=True)

    def type(self, text: str) -> None:
        subprocess.run([*self.tmux, "send-keys", text, "Enter"], check=True)

    def shown(self) -> str:
        """What stands on it, with its colours."""
        command = [*self.tmux, "capture-pane", "-p", "-e"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.rstrip()

    def wait_for_prompt(self, count: int) -> str:
        end = time.monotonic() + TIMEOUT_SECONDS
        while time.monotonic() < end:
            text = self.shown()
            if len(re.findall(rf"^{re.escape(PROMPT)}", text + "\n", re.M)) + text.endswith(PROMPT.strip()) >= count:
                return text
            time.sleep(0.2)
        raise SystemExit(f"still at work after {TIMEOUT_SECONDS} s:\n{self.shown()}")

    def close(self) -> None:
        subprocess.run([*self.tmux, "kill-server"], check=False)


def drawn(text: str) -> str:
    """The terminal's text as SVG, without the web font that a page's viewer would not load."""
    console = Console(record=True, width=COLUMNS, file=StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.from_ansi(text), soft_wrap=True)  # whole: a style may go on in the next line
    svg = console.export_svg(title="dtrain", theme=THEME, unique_id="run")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.S)
    return re.sub(r"font-family: Fira Code, monospace", f"font-family: {FONTS}", svg)


def main() -> None:
    """Train, take down, draw."""
    parser = argparse.ArgumentParser(description="Draw docs/run.svg from a real training.")
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "run.svg")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="dtrain-"))
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        parser.error(f"{folder} is not empty")
    shutil.copytree(ROOT / "configfiles", folder / "configfiles")
    terminal = Terminal(folder)
    try:
        terminal.wait_for_prompt(1)
        terminal.type(COMMAND)
        time.sleep(2)
        text = terminal.wait_for_prompt(2)
    finally:
        terminal.close()
    if "FINISHED" not in text:
        raise SystemExit(f"the training did not come to its end, nothing is drawn:\n{text}")
    options.output.write_text(drawn(text.rpartition("\n")[0]))


if __name__ == "__main__":
    main()
