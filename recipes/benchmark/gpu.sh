#!/usr/bin/env bash
# Speed of fast weights on this machine's GPU, beside other implementations:
#
#   bash recipes/benchmark/gpu.sh [GPU.PY_OPTION]...      the operators: a table, in a few minutes (--help)
#   bash recipes/benchmark/gpu.sh --all [OPTION]...       builds, tests, checks and times everything: 10 to 15 minutes
#
# Options of --all:
#   --output DIR    folder for the tables, gpu-*.csv, and logs (default: outputs/benchmark)
#   --data DIR      output folder of recipes/ui_strings/run.sh, whose data is trained on (default: its own default, where
#                   the data is made if it is not there)
#   --parts "..."   of the parts below, some
#   --rehearse      on a processor, with tiny sizes: shows that all parts run, and nothing else
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

set -euo pipefail
recipe=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(cd "$recipe/../.." && pwd)
python=${PYTHON:-python3}
export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

fail() {
    echo "gpu.sh: $*" >&2
    exit 1
}

case ${1:-} in
--all) shift ;;
-h | --help)
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
    exit
    ;;
*) exec "$python" "$recipe/gpu.py" "$@" ;;
esac

known="build tests sanitize training operators lm decode peer"
output=$repository/outputs/benchmark
data=$repository/outputs/ui_strings
parts=$known
rehearse=
while (($#)); do
    case $1 in
    --output | --data | --parts)
        (($# > 1)) || fail "$1 needs a value."
        printf -v "${1#--}" %s "$2"
        shift
        ;;
    --rehearse) rehearse=1 ;;
    *) fail "unknown argument '$1' (allowed are --output, --data, --parts, --rehearse)." ;;
    esac
    shift
done
for part in $parts; do
    [[ " $known " == *" $part "* ]] || fail "--parts has '$part', allowed are: ${known// /, }."
done
mkdir -p "$output"
output=$(cd "$output" && pwd)
why=$("$python" -W ignore -c 'import torch, fairseq' 2>&1 >/dev/null) || fail "$python cannot import torch and fairseq: ${why##*$'\n'}"
[[ -n $rehearse ]] || "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    fail "torch finds no GPU on this machine (--rehearse runs without one)."
{
    "$python" -c 'import sys, torch, numpy; print("Python", sys.version.split()[0], "torch", torch.__version__, "numpy", numpy.__version__)'
    [[ -n $rehearse ]] || "$python" -c 'import torch; print(torch.cuda.get_device_name(), torch.cuda.get_device_capability())'
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
    [[ -z $rehearse ]] || device=cpu
    local has_kernels="from fwp_fairseq.ops import native as n; assert not n.unavailable and n.supports('$device')"
    if "$python" -c "$has_kernels" 2>/dev/null; then
        echo "built before"
        return
    fi
    FWP_CUDA=$([[ -n $rehearse ]] || echo 1) "$python" setup.py build_ext --inplace
    "$python" -c "$has_kernels"
}

# --- Side by side: what is not timed ----------------------------------------------------------------------------------

run_tests() {
    cd "$repository"
    "$python" -m pytest -q -n 6 -p no:cacheprovider -k "not flash" tests/test_*_gpu.py
}

small_scan() {
    cat <<'END'
import torch
from fwp_fairseq.ops import fast_weight_scan, native
device = "cuda" if torch.cuda.is_available() else "cpu"
for backend in ("native", "triton") if device == "cuda" else ("native",):
    q, k = (torch.rand(2, 2, 150, 64, device=device).softmax(-1).requires_grad_() for _ in range(2))
    v = torch.randn(2, 2, 150, 64, device=device, requires_grad=True)
    g, a = (torch.rand(2, 2, 150, device=device).requires_grad_() for _ in range(2))
    fast_weight_scan(q, k, v, g, g, a, backend=backend)[0].sum().backward()
state, order = torch.rand(5, 2, 32, 16, device=device), torch.tensor([1, 1, 0, 4, 4], device=device)
q, k, v = (torch.rand(5, 2, 16, device=device) for _ in range(3))
g, places = torch.rand(5, 2, device=device), torch.arange(5, device=device)
features = native.AddressFeatures("dpfp", 1, "sum")
for _ in range(3):
    places = native.step(q, k, v, g, g, None, state, None, order, places, features)[1]
if device == "cuda":
    torch.cuda.synchronize()
print("small scan and steps done")
END
}

# sanitize TOOL
sanitize() {
    local command=("$python" -c "$(small_scan)")
    if [[ -n $rehearse ]]; then
        "${command[@]}"
    else
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 "${command[@]}"
    fi
}

# train NAME OPTION... -- OPTION...: the quick start with these options.
train() {
    local name=$1 here=$output/ui_strings epochs=()
    shift
    [[ -z $rehearse ]] || epochs=(--epochs 1)
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
[[ -n $rehearse ]] || amp=(--amp)
if [[ -f $data/corpus/valid.en ]]; then
    valid_size=$(wc -l <"$data/corpus/valid.en") test_size=$(wc -l <"$data/corpus/test.en")
fi
export -f build run_tests small_scan sanitize train
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
[[ -z $rehearse ]] || small=(--rehearse --repeats 2)
lines=60 part operators 180 "$python" "$recipe/gpu.py" --output "$output" --only triton native chunk "torch SDPA" ${small[@]+"${small[@]}"}
lm=(--gpu --precision fp16 --lengths 256 1024 4096 --batch 16384)
[[ -z $rehearse ]] || lm=(--lengths 32 --batch 128 --updates 4)
lines=14 part lm 150 "$python" "$recipe/models.py" --output "$output" --shape medium --table gpu-lm.csv "${lm[@]}"
[[ -n $rehearse ]] || lines=60 part decode 240 "$python" "$recipe/decode.py" --output "$output" --gpu
mkdir -p "$output/peer"
lines=30 part peer 240 "$python" "$recipe/gpu.py" --output "$output/peer" --only fla --no-steps ${small[@]+"${small[@]}"}
[[ ! -f $output/peer/gpu-operators.csv ]] || mv "$output/peer/gpu-operators.csv" "$output/gpu-peer.csv"

failed=$(awk '$2 { print $1 }' "$output/.gpu-status" | paste -s -d ' ')
echo "== all parts: $output/gpu-*.log, failed: ${failed:-none}"
[[ -z $failed ]]
