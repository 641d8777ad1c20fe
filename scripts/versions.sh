#!/usr/bin/env bash
# Runs the quick tests on every Python that is here, with the oldest torch and with the oldest of everything we accept.
#
#   bash scripts/test.sh --versions                        every case
#   bash scripts/test.sh --versions python3.13 lowest      some of them: python3.N, torch (the oldest), lowest (all packages)
#
# Each case has an environment of its own under .venvs, which is kept. The last lines are a table of the cases.
set -euo pipefail
# shellcheck source=scripts/venv.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/venv.sh"
cd -- "$root"

# The lock with the lower bounds of pyproject.toml in place of the pins: of torch alone, or of every dependency.
requirements() {
    "$1" - "$2" <<'PYTHON'
import re, sys, tomllib
from pathlib import Path

case = sys.argv[1]
facts = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
project = facts["project"]
found = (re.match(r"([\w.-]+)>=([\w.]+)", text) for text in project["dependencies"])
lowest = {match[1].lower(): match[2] for match in found if match}
lowest = {name: low for name, low in lowest.items() if case == "lowest" or (case == "torch" and name == "torch")}
# What the pinned packages need is not what older ones need: pip finds those.
keep_rest = case != "lowest"
for line in Path("requirements.lock").read_text(encoding="utf-8").splitlines():
    name = re.split("[=#]", line)[0].strip().lower()
    if name in lowest:
        print(f"{name}=={lowest[name]}")
    elif keep_rest and name and not (case == "torch" and name in ("setuptools", "sympy")):
        print(line)
if case == "torch":  # which does not go with the newest
    print(*facts["build-system"]["requires"], sep="\n")
if not keep_rest:
    extra = project["optional-dependencies"]["test"]
    print(*(item for item in extra if re.split(">=", item)[0] not in lowest), *facts["build-system"]["requires"], sep="\n")
PYTHON
}

interpreter_of() { case $1 in python*) printf '%s\n' "$1" ;; *) find_python ;; esac }

run_case() {
    local case=$1 folder=$root/.venvs/$1 interpreter list
    interpreter=$(interpreter_of "$case")
    list=$folder/requirements.txt
    if ! "$folder/bin/python" -c '' 2>/dev/null; then "$interpreter" -m venv "$folder"; fi
    requirements "$interpreter" "$case" >"$folder/wanted.txt"
    if ! cmp -s "$folder/wanted.txt" "$list"; then
        "$folder/bin/python" -m pip install -qq --no-compile -r "$folder/wanted.txt"
        "$folder/bin/python" -m pip install -qq --no-deps --no-build-isolation --editable "$root"
        "$folder/bin/python" -m pip install -qq --no-deps -r tests/requirements.lock
        mv "$folder/wanted.txt" "$list"
    fi
    local status=0
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$folder/bin/python" -m pytest --fast -q --numprocesses 3 --dist worksteal \
        >"$folder/output.txt" 2>&1 || status=$?
    rows+=("$(printf '%-12s %-9s %s' "$case" "$("$folder/bin/python" -c 'import platform; print(platform.python_version())')" \
        "torch $("$folder/bin/python" -c 'import torch; print(torch.__version__)')  $(tail -n 1 "$folder/output.txt")")")
    return "$status"
}

cases=("$@")
if ((${#cases[@]} == 0)); then
    for minor in 11 12 13 14 15; do
        if "python3.$minor" -c '' 2>/dev/null; then cases+=("python3.$minor"); fi
    done
    cases+=(torch lowest)
fi
rows=() failed=0
for case in "${cases[@]}"; do
    say "$case: .venvs/$case/output.txt"
    run_case "$case" || failed=1
done
printf '%s\n' "${rows[@]}"
exit "$failed"
