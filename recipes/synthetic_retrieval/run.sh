#!/usr/bin/env bash
# The synthetic retrieval experiments of the paper: train, and draw a figure. See README.md.
#
#   bash recipes/synthetic_retrieval/run.sh figure2|figure3|figure4|figure5 [--quick] [OPTION]...
#
#   --quick          fewer numbers of keys and one seed: for all four figures about an hour on two cores, by estimate
#   --jobs N         trainings at a time, one core each (default: the cores there are)
#   --sizes S...     only these numbers of keys
#   --seeds N...     only these seeds
#   --models NAME... only these models, such as dpfp1_sum
#   --output DIR     folder for runs.csv, the pictures and the logs (default: outputs/synthetic_retrieval)
#   --venv DIR|none  folder of the virtual environment, made if it is not there (default: OUTPUT/venv); none uses the
#                    active environment, which needs this package, fairseq and matplotlib
#
# What is done already is not done again: an interrupted command goes on when it is given again, and two of them can run
# side by side.

set -euo pipefail
recipe=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(cd "$recipe/../.." && pwd)
export FWP_SCRIPT=run.sh PYTHONUTF8=1 PIP_DISABLE_PIP_VERSION_CHECK=1
output=$repository/outputs/synthetic_retrieval
figure='' venv='' arguments=()

fail() {
    printf 'run.sh: %s\n' "$*" >&2
    exit 2
}

while (($#)); do
    case $1 in
    -h | --help)
        sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
        exit
        ;;
    --output | --venv)
        (($# > 1)) || fail "$1 needs a value."
        printf -v "${1#--}" %s "$2"
        shift
        ;;
    figure[2-5])
        [[ -z $figure ]] || fail "one figure at a time: '$figure' and '$1' were given."
        figure=$1
        ;;
    figure*) fail "there is no '$1', name a figure: figure2, figure3, figure4 or figure5 (--help lists the options)." ;;
    *) arguments+=("$1") ;;
    esac
    shift
done
[[ -n $figure ]] || fail "name a figure: figure2, figure3, figure4 or figure5 (--help lists the options)."
[[ -n $output ]] || fail "--output is empty."

python=${PYTHON:-$(command -v python3.11 || echo python3)}
if [[ $venv == none ]]; then
    python=${PYTHON:-python}
else
    mkdir -p -- "$output" || fail "--output $output cannot be made."
    venv=${venv:-$output/venv}
    marker=$venv/.fwp-synthetic
    fingerprint=$(cat "$repository"/{setup.py,constraints.txt,fwp_fairseq/csrc/*} "$recipe/run.sh" | cksum)
    if [[ ! -f $marker || $(<"$marker") != "$fingerprint" ]]; then
        echo "== making the environment $venv"
        "$python" -m venv -- "$venv"
        # Twice, because the compiled operators need torch to be there when they are built.
        (cd -- "$repository" &&
            "$venv/bin/python" -m pip install --quiet -c constraints.txt -e ".[fairseq]" matplotlib setuptools &&
            "$venv/bin/python" -m pip install --quiet -c constraints.txt --no-deps --no-build-isolation -e .)
        printf '%s\n' "$fingerprint" >"$marker"
    fi
    python=$venv/bin/python
fi

export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH}
"$python" "$recipe/sweep.py" "$figure" --output "$output" ${arguments[@]+"${arguments[@]}"}
"$python" "$recipe/draw.py" "$figure" --output "$output"
