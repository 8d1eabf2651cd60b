#!/usr/bin/env bash
# Runs all checks: ruff, mypy, pytest. Arguments go to pytest: bash tests/run.sh -k checkpoints
#
# If the active environment lacks something, a virtual environment is made first, once. FWP_TEST_VENV: its folder,
# which is then used in any case (default: .venv in the clone). PYTHON: what to make it with (3.10 to 3.12).

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1

has_everything() {
    "$1" - 2>/dev/null <<'END'
import importlib.util, sys
needed = "torch fairseq sacrebleu sentencepiece subword_nmt pytest xdist hypothesis ruff mypy babel polib sacremoses matplotlib setuptools pip onnx onnxruntime safetensors triton"
sys.exit(not all(importlib.util.find_spec(name) for name in needed.split()))
END
}

is_supported() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null
}

# Makes $venv if it is not there as setup.py and constraints.txt want it. The marker says whether it was finished.
set_up() {
    local python marker=$venv/.fwp-tests fingerprint clear=
    for python in ${PYTHON:-python3.11 python3.12 python3}; do
        if is_supported "$python"; then break; fi
        python=
    done
    if [[ -z $python ]]; then
        echo "tests/run.sh: needs Python 3.10, 3.11 or 3.12; the variable PYTHON can name it." >&2
        exit 1
    fi
    fingerprint=$({ "$python" --version && cat setup.py constraints.txt fwp_fairseq/csrc/*; } | cksum)
    if [[ -f $marker && $(<"$marker") == "$fingerprint" ]]; then return; fi
    # What is without the marker was made by somebody else: install into it, but remove nothing.
    if [[ -f $marker ]]; then clear=--clear; fi
    echo "== making the environment $venv"
    "$python" -m venv $clear "$venv"
    echo unfinished >"$marker"
    "$venv/bin/python" -m pip install --quiet -c constraints.txt -e ".[fairseq,test]"
    # Again, for the compiled operators, which are built where torch is installed.
    "$venv/bin/python" -m pip install --quiet -c constraints.txt --no-deps --no-build-isolation -e .
    echo "$fingerprint" >"$marker"
}

python=python
if [[ -n ${FWP_TEST_VENV:-} ]] || ! has_everything python; then
    venv=${FWP_TEST_VENV:-.venv}
    set_up
    python=$(cd "$venv" && pwd)/bin/python
fi

failed=()
check() {
    local name=$1
    shift
    echo "== $name"
    "$python" -m "$@" || failed+=("$name")
}
check lint ruff check
check format ruff format --check
check types mypy
# As many at a time as there are cores. A file stays together: its tests share what they train.
check tests pytest -n auto --dist loadfile --no-loadscope-reorder --durations 10 "$@"
if ((${#failed[@]})); then
    echo "tests/run.sh: failed: ${failed[*]}" >&2
    exit 1
fi
