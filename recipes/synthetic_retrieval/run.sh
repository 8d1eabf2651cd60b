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

recipe=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$recipe/../common.sh"
export FWP_SCRIPT=run.sh
output=$repository/outputs/synthetic_retrieval
figure='' venv='' arguments=()

# As sweep.py does, whose options the others are.
fail() {
    printf 'run.sh: %s\n' "$*" >&2
    exit 2
}

while (($#)); do
    case $1 in
    -h | --help)
        usage
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

python=${PYTHON:-python}
if [[ $venv != none ]]; then
    python=${PYTHON:-$(command -v python3.11 || echo python3)}
    mkdir -p -- "$output" || fail "--output $output cannot be made."
    venv=$(realpath -m -- "${venv:-$output/venv}")
fi
enter_environment
"$python" "$recipe/sweep.py" "$figure" --output "$output" ${arguments[@]+"${arguments[@]}"}
"$python" "$recipe/draw.py" "$figure" --output "$output"
