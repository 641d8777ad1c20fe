#!/usr/bin/env bash
# Runs every check: lint, format, types, then the tests.
#
#   bash scripts/test.sh                           all tests: what CI runs
#   bash scripts/test.sh --fast                    only tests that take little time: an answer in under 3 minutes
#   bash scripts/test.sh --versions                the same on every Python that is here, and with the oldest packages
#   bash scripts/test.sh [PYTEST ARGUMENTS ...]    tests/config/test_load.py -k override; --soak for the long repetitions
#
# The first start makes .venv (see venv.sh). pytest's summary is the last line.
set -euo pipefail
# shellcheck source=scripts/venv.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/venv.sh"
if [[ ${1:-} == --versions ]]; then exec bash "$root/scripts/versions.sh" "${@:2}"; fi

# Programs that some tests drive; a test without its program is skipped and says so. Each is PROGRAM, or PROGRAM=PACKAGE
# where Debian's package has another name.
install_programs() {
    local missing=() program
    for program in "$@"; do
        if ! PATH=$PATH:/usr/sbin:/sbin command -v "${program%=*}" >/dev/null; then missing+=("${program#*=}"); fi
    done
    if ((${#missing[@]} == 0)); then return; fi
    if ((EUID == 0)) && command -v apt-get >/dev/null && apt_install "${missing[@]}"; then return; fi
    say "not installed: ${missing[*]}; the tests that need them are skipped (apt-get install ${missing[*]})"
}

apt_install() {
    local policy=/usr/sbin/policy-rc.d own=0 status=0
    export DEBIAN_FRONTEND=noninteractive
    # The packages' services are not to start: the tests start SLURM's daemons themselves, and end them.
    if [[ ! -e $policy ]] && printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod 755 "$policy"; then own=1; fi
    # A fresh machine has no package lists yet.
    apt-get install -y --no-install-recommends "$@" >/dev/null 2>&1 ||
        { apt-get update && apt-get install -y --no-install-recommends "$@"; } >/dev/null 2>&1 || status=$?
    if ((own)); then rm -f "$policy"; fi
    return "$status"
}

install_programs git shellcheck tmux munged=munge slurmctld slurmd sbatch=slurm-client chromium &
programs=$!
make_venv
wait "$programs"
cd -- "$root"
# What some tests compare with. Without dependencies: theirs would bring torchvision, which breaks beside a CPU torch.
"$python" -m pip install -qq --no-deps -r tests/requirements.lock

# Where the environment forbids Python to keep what it compiles, each of the thousands of processes would do it again.
"$python" -m compileall -q dtrain tests
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy

cores=$(getconf _NPROCESSORS_ONLN)
# One thread per worker: the tests start processes of their own, and none depends on speed. Two workers more than cores,
# since many wait; each takes a stretch of neighbours, which share what takes long to make, then some of another's.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Thousands of processes share the machine: what fails is tried once more, and the summary shows what the first try said.
exec "$python" -m pytest --numprocesses $((cores < 7 ? cores + 2 : 8)) --dist worksteal --reruns 1 "$@"
