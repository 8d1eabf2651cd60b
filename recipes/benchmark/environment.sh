#!/usr/bin/env bash
# Make the virtual environment of the benchmark in folder $1: this package and the implementations it is compared with.
# A peer that cannot be installed is left out, and said so. Needs a C++ compiler.

set -euo pipefail
venv=${1:?folder of the environment}
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
marker=$venv/.fwp-benchmark
fingerprint=$(cat setup.py constraints.txt fwp_fairseq/csrc/* recipes/benchmark/environment.sh | cksum)
[[ ! -f $marker || $(<"$marker") != "$fingerprint" ]] || exit 0

echo "== making the environment $venv"
"${PYTHON:-python3.11}" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check)
"${pip[@]}" install --quiet -c constraints.txt -e ".[fairseq]" matplotlib wheel setuptools
"${pip[@]}" install --quiet -c constraints.txt --no-deps --no-build-isolation -e .
# Without nvcc on PATH: the kernels compared here are those for the processor.
PATH=$(cd "$venv/bin" && pwd):/usr/bin:/bin \
    "${pip[@]}" install --quiet -c constraints.txt --no-build-isolation pytorch-fast-transformers==0.4.0 ||
    echo "environment.sh: left out: pytorch-fast-transformers 0.4.0" >&2
"${pip[@]}" install --quiet -c constraints.txt --no-deps flash-linear-attention==0.6.0 fla-core==0.6.0 einops ||
    echo "environment.sh: left out: flash-linear-attention 0.6.0" >&2
"${pip[@]}" install --quiet -c constraints.txt ctranslate2==4.8.5 ||
    echo "environment.sh: left out: CTranslate2 4.8.5" >&2
echo "$fingerprint" >"$marker"
