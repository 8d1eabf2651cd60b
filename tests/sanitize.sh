#!/usr/bin/env bash
# Builds the compiled operators with the address sanitizer, in a copy, and runs their tests: any read or write outside
# of a buffer ends the run. Uses the active environment, which needs torch, fairseq, pytest, hypothesis and a C++
# compiler (gcc). Arguments go to pytest.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r fwp_fairseq tests setup.py pyproject.toml README.md LICENSE "$copy"
cd "$copy"
rm -f fwp_fairseq/*.so
FWP_SANITIZE=1 python setup.py --quiet build_ext --inplace
[[ -n $(compgen -G 'fwp_fairseq/*.so') ]] || { echo "sanitize.sh: the operators could not be built." >&2; exit 1; }
# Python itself is not built for the sanitizer, so its runtime is loaded first, with the C++ library whose exceptions it
# watches; what Python and torch never free is not the question.
LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libstdc++.so.6)"
export LD_PRELOAD ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0
unchecked="loop- or chunk- or memory_stays or installs_without or compiled_function or beam_search"
python -m pytest -q -p no:cacheprovider tests/test_ops_contract.py tests/test_native.py tests/test_decoding.py tests/test_few_rows_linear.py \
    -k "(native or test_decoding or few_rows) and not ($unchecked)" "$@"
