# shellcheck shell=bash
# For scripts that need a GPU, which source it: sets $python to an interpreter whose torch sees one and that has what
# dtrain imports. Ends the script, with a line that says why, where there is no torch or no GPU (status 0: nothing was
# to be done) or where a package cannot be installed (1). Expects $root, and the script's own arguments.
temporary=$(mktemp -d)
trap 'rm -rf -- "$temporary"' EXIT

say() { printf '%s\n' "$*"; }

find_python() {
    local candidates=("$root/.venv/bin/python" python3 python) candidate
    if [[ -n ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import torch' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    return 1
}

# What dtrain imports and this interpreter lacks, as names for pip.
missing() {
    "$python" - <<'END'
from importlib.util import find_spec
needed = {"accelerate": "accelerate>=1.10", "filelock": "filelock", "ml_collections": "ml-collections",
          "numpy": "numpy", "psutil": "psutil", "yaml": "pyyaml", "rich": "rich", "safetensors": "safetensors"}
print(" ".join(package for module, package in needed.items() if find_spec(module) is None))
END
}

# An environment that sees all of the interpreter's packages, so that its torch stays the one that sees the GPU.
add() {
    local source=() site
    if [[ -n ${WHEELS:-} ]]; then source=(--no-index --find-links "$WHEELS"); fi
    "$python" -m venv --system-site-packages "$temporary/venv" >/dev/null || return 1
    # Where that interpreter is of a virtual environment itself, "system" means the one beneath; so by path, too.
    site=$("$temporary/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$python" -c 'import sys; print(*[path for path in sys.path if path.endswith("-packages")], sep="\n")' \
        >"$site/parent.pth"
    "$python" -c 'import torch; print("torch==" + torch.__version__)' >"$temporary/constraints.txt"
    "$temporary/venv/bin/python" -m pip install -qq --disable-pip-version-check "${source[@]}" \
        -c "$temporary/constraints.txt" "$@" || return 1
    python=$temporary/venv/bin/python
}

if ! python=$(find_python); then
    say "skip everything: no Python with torch; name one: PYTHON=/path/to/python bash $0"
    exit 0
fi
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' && [[ " $* " != *" cpu "* ]]; then
    version=$("$python" -c 'import torch; print(torch.__version__)')
    say "skip everything: torch $version sees no CUDA GPU on this machine"
    exit 0
fi
version=$("$python" -c 'import torch; print(*torch.__version__.split(".")[:2])')
read -r major minor <<<"$version"
if ((major < 2 || (major == 2 && minor < 10))); then
    say "skip everything: torch $major.$minor is older than 2.10"
    exit 0
fi
read -ra packages <<<"$(missing)"
if ((${#packages[@]})); then
    say "not installed here, added for these checks: ${packages[*]}"
    if ! add "${packages[@]}"; then
        say "FAIL environment: ${packages[*]} could not be installed; give a folder of wheels: WHEELS=<folder> bash $0"
        exit 1
    fi
fi
if ! "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("mlflow") is None)'; then
    say "mlflow is not installed here: the journal alone is checked"
fi
