#!/usr/bin/env bash
# Speed of fast weights on this machine's GPU, beside other implementations:
#
#   bash recipes/benchmark/gpu.sh [GPU.PY_OPTION]...      the operators: a table, in a few minutes (--help)
#   bash recipes/benchmark/gpu.sh --all [OPTION]...       builds, tests, checks and times everything: 10 to 15 minutes
#
# Parts, each with a time limit and a log of its own; what fails or takes too long stops none of the others:
#   build      the operators with their kernels, if they are not there
#   tests      tests/test_*_gpu.py
#   sanitize   compute-sanitizer's memcheck and racecheck on small sizes
#   training   the quick start (recipes/ui_strings) with softmax, its default and fast weights in all places, with --amp:
#              BLEU. These first four run side by side once there is something built; what follows is timed and runs alone
#   operators  gpu-operators.csv and gpu-step.csv: the recurrence and the step beside other implementations
#   lm         gpu-lm.csv: words per second of training the paper's medium language model
#   decode     gpu-decode.csv: fairseq-generate, token by token (not rehearsed)
#   peer       gpu-peer.csv: flash-linear-attention's operators, which take minutes to choose their own settings
#
# Uses the active environment, which needs torch for CUDA and fairseq; the environment variable PYTHON names another
# interpreter (default: python3).

recipe=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$recipe/../common.sh"
python=${PYTHON:-python3}
export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

case ${1:-} in
--all) shift ;;
-h | --help) ;;
*) exec "$python" "$recipe/gpu.py" "$@" ;;
esac
known="build tests sanitize training operators lm decode peer"
option output text "$repository/outputs/benchmark" "folder for the tables, gpu-*.csv, and logs"
option data text "$repository/outputs/ui_strings" \
    "output folder of recipes/ui_strings/run.sh, whose data is trained on; made if it is not there"
option parts "some $known" "$known" "of the parts, some"
option rehearse flag 0 "on a processor, with tiny sizes: shows that all parts run, and nothing else"
parse_options "$@"
mkdir -p "$output"
output=$(cd "$output" && pwd)
why=$("$python" -W ignore -c 'import torch, fairseq' 2>&1 >/dev/null) || fail "$python cannot import torch and fairseq: ${why##*$'\n'}"
((rehearse)) || "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    fail "torch finds no GPU on this machine (--rehearse runs without one)."
{
    "$python" -c 'import sys, torch, numpy; print("Python", sys.version.split()[0], "torch", torch.__version__, "numpy", numpy.__version__)'
    ((rehearse)) || "$python" -c 'import torch; print(torch.cuda.get_device_name(), torch.cuda.get_device_capability())'
    git -C "$repository" rev-parse --short HEAD 2>/dev/null || true
} | tee "$output/gpu-machine.txt"

# part NAME SECONDS COMMAND...: run one that was chosen, a program or an exported function; its output goes to a log, of
# which the end is shown.
part() {
    local name=$1 limit=$2 status=0 begun=$SECONDS
    shift 2
    [[ " $parts " == *" ${name%%-*} "* ]] || return 0
    timeout -k 5 "$limit" bash -euo pipefail -c '"$@"' part "$@" >"$output/gpu-$name.log" 2>&1 </dev/null || status=$?
    {
        printf '== %s: ' "$name"
        case $status in
        0) printf 'done' ;;
        124 | 137) printf 'stopped at its limit' ;;
        *) printf 'failed (%s)' "$status" ;;
        esac
        printf ', %s s\n' "$((SECONDS - begun))"
        tail -n "${lines:-6}" "$output/gpu-$name.log" | cut -c -160
    } >"$output/.gpu-$name.end"
    cat "$output/.gpu-$name.end"
    printf '%s %s\n' "$name" "$status" >>"$output/.gpu-status"
}
: >"$output/.gpu-status"

# --- Building ---------------------------------------------------------------------------------------------------------

build() {
    cd "$repository"
    local device=cuda
    ((!rehearse)) || device=cpu
    local has_kernels="from fwp_fairseq.ops import native as n; assert not n.unavailable and n.supports('$device')"
    if "$python" -c "$has_kernels" 2>/dev/null; then
        echo "built before"
        return
    fi
    FWP_CUDA=$( ((rehearse)) || echo 1) "$python" setup.py build_ext --inplace
    "$python" -c "$has_kernels"
}

# --- Side by side: what is not timed ----------------------------------------------------------------------------------

run_tests() {
    cd "$repository"
    "$python" -m pytest -q -n 6 -p no:cacheprovider -k "not flash" tests/test_*_gpu.py
}

# sanitize TOOL
sanitize() {
    local command=("$python" "$recipe/small_scan.py")
    if ((rehearse)); then
        "${command[@]}"
    else
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 "${command[@]}"
    fi
}

# train NAME OPTION... -- OPTION...: the quick start with these options.
train() {
    local name=$1 here=$output/ui_strings epochs=()
    shift
    ((!rehearse)) || epochs=(--epochs 1)
    mkdir -p "$here"
    # A folder of its own for every one: they run side by side.
    [[ ! -d $data ]] || [[ -d $here/$name ]] || {
        mkdir "$here/$name"
        cp -r "$data"/{.ui-strings,corpus,text,data-bin,steps} "$here/$name/"
    }
    bash "$recipe/../ui_strings/run.sh" --python "$python" --venv none --output "$here/$name" --model "$name" \
        --valid-size "${valid_size:-500}" --test-size "${test_size:-500}" ${epochs[@]+"${epochs[@]}"} "$@"
}

places=(--encoder-self-attention fast-weight --decoder-self-attention fast-weight --cross-attention fast-weight)
amp=()
((rehearse)) || amp=(--amp)
if [[ -f $data/corpus/valid.en ]]; then
    valid_size=$(wc -l <"$data/corpus/valid.en") test_size=$(wc -l <"$data/corpus/test.en")
fi
export -f build run_tests sanitize train
export recipe repository python output data rehearse valid_size test_size

part build 300 build
part tests 240 run_tests &
for tool in memcheck racecheck; do
    part "sanitize-$tool" 150 sanitize "$tool" &
done
part training-softmax 300 train softmax --softmax -- ${amp[@]+"${amp[@]}"} &
part training-default 300 train default -- ${amp[@]+"${amp[@]}"} &
part training-everywhere 300 train everywhere "${places[@]}" -- ${amp[@]+"${amp[@]}"} &
wait

# --- One after the other: what is timed -------------------------------------------------------------------------------

small=()
((!rehearse)) || small=(--rehearse --repeats 2)
lines=60 part operators 180 "$python" "$recipe/gpu.py" --output "$output" --only triton native chunk "torch SDPA" ${small[@]+"${small[@]}"}
lm=(--gpu --precision fp16 --lengths 256 1024 4096 --batch 16384)
((!rehearse)) || lm=(--lengths 32 --batch 128 --updates 4)
lines=14 part lm 150 "$python" "$recipe/models.py" --output "$output" --shape medium --table gpu-lm.csv "${lm[@]}"
((rehearse)) || lines=60 part decode 240 "$python" "$recipe/decode.py" --output "$output" --gpu
mkdir -p "$output/peer"
lines=30 part peer 240 "$python" "$recipe/gpu.py" --output "$output/peer" --only fla --no-steps ${small[@]+"${small[@]}"}
[[ ! -f $output/peer/gpu-operators.csv ]] || mv "$output/peer/gpu-operators.csv" "$output/gpu-peer.csv"

failed=$(awk '$2 { print $1 }' "$output/.gpu-status" | paste -s -d ' ')
echo "== all parts: $output/gpu-*.log, failed: ${failed:-none}"
[[ -z $failed ]]
