#!/usr/bin/env bash
# Speed of fast weights on this machine's processor, beside other implementations. See README.md.
#
#   bash recipes/benchmark/run.sh [--output DIR] [--only operators|models] [--venv DIR|none] [-- OPTION...]
#
# Makes an environment (environment.sh), unless there is one, or --venv none says to use the active one. What follows --
# goes to operators.py or models.py, with --only. Tables go to the terminal and, with CSV files and the plot, to DIR.

set -euo pipefail
recipe=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
output=$recipe/../../outputs/benchmark
only= venv=

fail() {
    echo "run.sh: $*" >&2
    exit 1
}

while (($#)); do
    case $1 in
    --output | --only | --venv)
        (($# > 1)) || fail "$1 needs a value."
        printf -v "${1#--}" %s "$2"
        shift
        ;;
    --)
        shift
        break
        ;;
    -h | --help)
        sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit
        ;;
    *) fail "unknown argument '$1' (allowed are --output, --only, --venv, --)." ;;
    esac
    shift
done
[[ $only =~ ^(operators|models)?$ ]] || fail "--only is '$only', allowed are operators and models."
(($# == 0)) || [[ -n $only ]] || fail "options after -- are for one part: name it with --only."
mkdir -p "$output"
output=$(cd "$output" && pwd)

# Otherwise glibc gives every large tensor back to the system and takes it again page by page: noise for everyone.
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296

python=python
if [[ $venv != none ]]; then
    venv=${venv:-$output/venv}
    bash "$recipe/environment.sh" "$venv"
    python=$venv/bin/python
fi

for part in ${only:-operators models}; do
    echo "== $part"
    "$python" "$recipe/$part.py" --output "$output" "$@" | tee "$output/$part.txt.new"
    mv "$output/$part.txt.new" "$output/$part.txt"
done
