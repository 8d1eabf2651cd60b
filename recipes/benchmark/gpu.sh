#!/usr/bin/env bash
# Speed of fast weights on this machine's GPU, beside other implementations: bash recipes/benchmark/gpu.sh [--repeats N]
#
# Uses the active environment, which needs torch for CUDA and this package with its kernels for a GPU (built where a CUDA
# toolkit is, see the main README); flash-linear-attention is timed, too, if it is installed. Prints a table.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} exec python recipes/benchmark/gpu.py "$@"
