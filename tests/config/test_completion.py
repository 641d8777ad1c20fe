"""Shell completion: what is offered for a line, and that bash, zsh and fish offer it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from dtrain.cli import COMMANDS
from dtrain.config.completion import SCRIPTS, complete

ARGUMENTS = {name: command[1] for name, command in COMMANDS.items()}


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("tra", ["train"]),
        ("test configfiles/digits.yaml --che", ["--checkpoint"]),
        ("export runs/x --format ", ["onnx", "safetensors", "torch"]),
        ("completion z", ["zsh"]),
        ("train configfiles/dig", ["configfiles/digits.yaml"]),
        ("configfiles/digits.yaml optimizer.l", ["optimizer.lr=", "optimizer.layer_decay="]),
        ("train configfiles/digits.yaml optim", ["optimizer."]),
        ("train configfiles/digits.yaml model.dep", ["model.depth="]),
        ("train configfiles/digits.yaml loaders.tr", ["loaders.train."]),
        ("train configfiles/digits.yaml loaders.train.sp", ["loaders.train.split="]),
        ("train configfiles/digits.yaml metrics.Acc", ["metrics.Accuracy."]),
        ("train configfiles/digits.yaml metrics.Accuracy.thr", ["metrics.Accuracy.threshold="]),
        ("train configfiles/digits.yaml trainer.ddp.backend=", ["gloo", "nccl", "null"]),
        ("train configfiles/digits.yaml trainer.deterministic=", ["true", "false"]),
        ("train configfiles/digits.yaml optimizer.name=AdamW", ["AdamW"]),
        ("train configfiles/digits.yaml optimizer.name=SGD optimizer.nest", ["optimizer.nesterov="]),
        ("launch configfiles/unet3d_cells.yaml loaders.train.transforms.0.na", ["loaders.train.transforms.0.name="]),
        (
            "train configfiles/unet3d_cells.yaml loaders.train.slice_builder.hal",
            ["loaders.train.slice_builder.halo_shape="],
        ),
        ("train no.yaml optimizer.l", []),
    ],
)
def test_what_is_offered(line: str, offered: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    found = complete(line.split(" "), ARGUMENTS)
    is_value = "=" in line.split(" ")[-1]
    assert sorted(item.partition("=")[2] if is_value else item for item in found) == sorted(offered)


@pytest.mark.slow
def test_it_needs_neither_torch_nor_numpy() -> None:
    code = "import sys; from dtrain.cli import main; main(sys.argv[1:]); print({'torch', 'numpy'} & {*sys.modules})"
    words = ["completion", "bash", "--", "train", "configfiles/digits.yaml", "optimizer.l"]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.split("\n")[:3] == ["optimizer.lr=", "optimizer.layer_decay=", "set()"], done.stderr


IN_BASH = """
eval "$(dtrain completion bash)"
COMP_LINE="$1"; COMP_POINT=${#1}; COMP_WORDBREAKS=$' \\t\\n"'"'"'><=;|&(:'
_dtrain 2>/dev/null; printf '%s\\n' "${COMPREPLY[@]}"
"""
IN_ZSH = """
autoload -Uz compinit && compinit -u -D
eval "$(dtrain completion zsh)"
compadd() { while [[ $1 == -* && $1 != -- ]]; do [[ $1 == -S ]] && shift; shift; done; shift; print -l -- "$@"; }
words=(${(s: :)1}); [[ $1 == *\\  ]] && words+=(""); CURRENT=$#words
_dtrain
"""
IN_FISH = """
dtrain completion fish | source
complete -C $argv[1]
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shell", "script"), [("bash", IN_BASH), ("zsh", IN_ZSH), ("fish", IN_FISH)], ids=("bash", "zsh", "fish")
)
def test_a_real_shell_completes(shell: str, script: str, tmp_path: Path, clean_env: dict[str, str]) -> None:
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "dtrain").write_text(f'#!/bin/sh\nexec {sys.executable} -m dtrain "$@"\n')
    (tmp_path / "dtrain").chmod(0o755)
    (tmp_path / "script").write_text(script)
    env = clean_env | {"PATH": f"{tmp_path}:{clean_env['PATH']}", "PYTHONPATH": str(REPOSITORY), "HOME": str(tmp_path)}
    lines = {
        "dtrain conf": ["config"],
        "dtrain train configfiles/digits.yaml model.hea": ["model.heads="],
        "dtrain train configfiles/digits.yaml trainer.strategy=d": [
            "ddp" if shell == "bash" else "trainer.strategy=ddp"
        ],
    }
    for line, offered in lines.items():
        command = [shell, str(tmp_path / "script"), line]
        done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True)
        found = [item for item in done.stdout.split("\n") if item and not item.startswith("configfiles")]
        assert found == offered, done.stderr


def test_every_shell_has_a_script() -> None:
    assert set(SCRIPTS) == set(ARGUMENTS["completion"]["shell"]["choices"])
