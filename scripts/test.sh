#!/usr/bin/env bash
# Runs every check: lint, format, types, then the tests.
#
#   bash scripts/test.sh [PYTEST ARGUMENTS ...]       tests/test_config.py -k override; --soak for the long repetitions
#
# The first start makes .venv (see venv.sh). pytest's summary is the last line.
set -euo pipefail
# shellcheck source=scripts/venv.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/venv.sh"

# Programs that some tests drive; a test without its program is skipped and says so. Each is named as its Debian package.
install_programs() {
    local missing=() program
    for program in "$@"; do
        if ! command -v "$program" >/dev/null; then missing+=("$program"); fi
    done
    if ((${#missing[@]} == 0)); then return; fi
    if ((EUID == 0)) && command -v apt-get >/dev/null && apt_install "${missing[@]}"; then return; fi
    say "not installed: ${missing[*]}; the tests that need them are skipped (apt-get install ${missing[*]})"
}

apt_install() {
    export DEBIAN_FRONTEND=noninteractive
    apt-get install -y --no-install-recommends "$@" >/dev/null 2>&1 && return
    # A fresh machine has no package lists yet.
    apt-get update >/dev/null 2>&1 && apt-get install -y --no-install-recommends "$@" >/dev/null 2>&1
}

make_venv
install_programs git shellcheck tmux
cd -- "$root"
# What some tests compare with. Without dependencies: theirs would bring torchvision, which breaks beside a CPU torch.
"$python" -m pip install -qq --no-deps -r tests/requirements.lock

"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy

cores=$(getconf _NPROCESSORS_ONLN)
# One thread per worker: the tests start processes of their own, and none depends on speed.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$python" -m pytest --numprocesses $((cores < 8 ? cores : 8)) "$@"
