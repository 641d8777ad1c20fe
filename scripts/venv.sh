# shellcheck shell=bash
# Makes .venv from requirements.lock, and reuses it while nothing changed. Sourced by the scripts beside it, which then
# call make_venv and use $root (the repository) and $python (the environment's interpreter).
#
# PYTHON=... chooses the interpreter for a new .venv (3.11 or newer). A torch in .venv that sees a GPU is never replaced.

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
python=$venv/bin/python
stamp=$venv/dtrain.stamp
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

say() { printf '%s\n' "$*" >&2; }

# What .venv was made from. The folder is part of it, since the editable installation points there.
wanted() { printf '%s\n' "$root"; cat "$root/requirements.lock" "$root/pyproject.toml"; }

make_venv() {
    if "$python" -c '' 2>/dev/null; then
        if [[ -n ${PYTHON:-} ]]; then say "$venv exists and is used; delete it to have it made with PYTHON=$PYTHON"; fi
        # Other makers of environments leave pip out, and so does a creation that was cut off.
        "$python" -c 'import pip' 2>/dev/null || "$python" -m ensurepip >/dev/null
    else
        local interpreter
        interpreter=$(find_python)
        "$interpreter" -m venv --clear "$venv"
    fi
    if [[ $(wanted) != "$(cat "$stamp" 2>/dev/null)" ]]; then
        rm -f "$stamp"
        install_packages
        wanted >"$stamp" # last: an installation that was cut off is taken up again
    fi
}

find_python() {
    local candidates=(python3 python3.13 python3.12 python3.11) candidate
    if [[ -n ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    say "dtrain needs Python 3.11 or newer; tried: ${candidates[*]}. Choose one: PYTHON=/path/to/python3.11 bash $0"
    return 1
}

install_packages() {
    local torch
    torch=$(grep '^torch==' "$root/requirements.lock")
    say "installing requirements.lock into $venv; this takes some minutes"
    if sees_gpu; then
        torch=$("$python" -c 'import torch; print(f"torch=={torch.__version__}")')
        say "$torch sees a GPU and is kept"
    fi
    sed "s/^torch==.*/$torch/" "$root/requirements.lock" >"$venv/requirements.txt"
    # pip compiles on one core, which takes longer than all the rest, and packages' own tests, a quarter of all, which
    # nobody imports. Some packages hold files that are no Python.
    "$python" -m pip install -qq --progress-bar off --no-compile -r "$venv/requirements.txt"
    "$python" -m compileall -q -j 0 -x 'site-packages/.*/tests/' "$venv/lib" >/dev/null || true
    # Without isolation: the lock holds setuptools, nothing more is downloaded.
    "$python" -m pip install -qq --no-deps --no-build-isolation --editable "$root"
}

sees_gpu() { "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; }
