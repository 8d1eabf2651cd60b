#!/usr/bin/env bash
# Train and score several kinds of attention with the same data, sizes and budget, with several seeds. See README.md.

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# What is compared: attention | where | name of the model | options of run.sh. Its default is two-directions-self-conv.
everywhere="--encoder-self-attention fast-weight --decoder-self-attention fast-weight --cross-attention fast-weight"
decoder="--encoder-self-attention softmax --decoder-self-attention fast-weight --cross-attention softmax"
sum_memories="-- --whole-memory-update-rule sum --whole-memory-feature-map elu --whole-memory-attention-normalization"
self="--encoder-self-attention fast-weight --decoder-self-attention fast-weight --cross-attention softmax"
convolution="--short-convolution 4"
softmax_convolution="--softmax-short-convolution 4"
sum_cross="-- --cross-update-rule sum --cross-attention-normalization"
slots="-- --cross-slots 32"
two_directions="--encoder-reading two-directions"
sum_elu="--rule sum --feature-map elu --attention-normalization"
sum_dpfp="--rule sum --feature-map dpfp --dpfp-nu 1"
delta_dpfp="--rule delta --feature-map dpfp --dpfp-nu 1"
delta_elu="--rule delta --feature-map elu"
gated_dpfp="--rule gated-delta --feature-map dpfp --dpfp-nu 1"
configurations=(
    "softmax | nowhere | softmax | --softmax"
    "softmax, convolution | nowhere | softmax-conv | --softmax $softmax_convolution"
    "delta, dpfp-1 | decoder self-attention | delta-dpfp-decoder | $delta_dpfp $decoder"
    "sum, elu, attention normalisation | all three places | sum-elu-all | $sum_elu $everywhere"
    "sum, dpfp-1 | all three places | sum-dpfp-all | $sum_dpfp $everywhere"
    "delta, dpfp-1 | all three places | delta-dpfp-all | $delta_dpfp $everywhere"
    "delta, dpfp-1; elsewhere sum, elu, attention normalisation | all three places | mixed-all | $delta_dpfp $everywhere $sum_memories"
    "delta, elu | all three places | delta-elu-all | $delta_elu $everywhere"
    "sum, elu, attention normalisation | decoder self-attention | sum-elu-decoder | $sum_elu $decoder"
    "sum, dpfp-1 | decoder self-attention | sum-dpfp-decoder | $sum_dpfp $decoder"
    "delta, elu | decoder self-attention | delta-elu-decoder | $delta_elu $decoder"
    "delta, dpfp-1, convolution | decoder self-attention | conv-delta-decoder | $delta_dpfp $decoder $convolution"
    "delta, dpfp-1, convolution | encoder and decoder self-attention | conv-delta-self | $delta_dpfp $self $convolution"
    "gated delta, dpfp-1, convolution | decoder self-attention | conv-gated-decoder | $gated_dpfp $decoder $convolution"
    "gated delta, dpfp-1, convolution | encoder and decoder self-attention | conv-gated-self | $gated_dpfp $self $convolution"
    "gated delta, dpfp-1, convolution, two directions in the encoder | encoder and decoder self-attention | two-directions-self | $gated_dpfp $self $convolution $two_directions"
    "gated delta, dpfp-1, convolution; softmax, convolution | decoder self-attention | conv-gated-decoder-conv | $gated_dpfp $decoder $convolution $softmax_convolution"
    "gated delta, dpfp-1, convolution, two directions in the encoder; softmax, convolution | encoder and decoder self-attention | two-directions-self-conv | $gated_dpfp $self $convolution $two_directions $softmax_convolution"
    "delta, dpfp-1, convolution | all three places | conv-delta-all | $delta_dpfp $everywhere $convolution"
    "delta, dpfp-1, convolution; cross-attention sum, attention normalisation | all three places | conv-delta-sum-all | $delta_dpfp $everywhere $convolution $sum_cross"
    "gated delta, dpfp-1, convolution, two directions in the encoder; cross-attention sum, attention normalisation | all three places | two-directions-all | $gated_dpfp $everywhere $convolution $two_directions $sum_cross"
    "gated delta, dpfp-1, convolution, two directions in the encoder; cross-attention sum, attention normalisation, in the last layer softmax | all three places | two-directions-last-cross | $gated_dpfp $everywhere $convolution $two_directions $sum_cross --cross-softmax-layers 2"
    "gated delta, dpfp-1, convolution, two directions in the encoder; cross-attention by 32 slots | all three places | two-directions-slots | $gated_dpfp $everywhere $convolution $two_directions $slots"
)

usage() {
    cat <<END
Usage: bash compare.sh [OPTION]... [-- FAIRSEQ_TRAIN_OPTION...]

Train and score with run.sh:
END
    local row attention places name flags
    for row in "${configurations[@]}"; do
        read_row "$row"
        printf '  %-24s %s; fast weights in: %s\n' "$name" "$attention" "$places"
    done
    cat <<END
What is done already is not done again. The table is printed and written to OUTPUT/compare.md and OUTPUT/compare.csv.

Takes 10 minutes of two cores for each training, and 30 MB of disk.
END
}

names() { printf '%s\n' "${configurations[@]}" | cut -d '|' -f 3 | xargs; }

# Split a row of the table into the variables attention, places, name and flags.
read_row() {
    IFS='|' read -r attention places name flags <<<"$1"
    attention=${attention% } places=${places# } places=${places% } name=${name// /}
    read -ra flags <<<"$flags"
}

common_options
several_runs_options
option epochs count 20 "passes over the training pairs"
option only "some $(names)" "" "names of what to compare, between spaces (default: all)"
option jobs count 1 "how many to train at a time; they share the processor's cores"
parse_options "$@"
chosen=()
for row in "${configurations[@]}"; do
    read_row "$row"
    [[ -n $only && " $only " != *" $name "* ]] || chosen+=("$row")
done
enter_several_runs
if [[ -z $threads ]]; then
    threads=$(($("$python" -c 'import os; print(len(os.sched_getaffinity(0)))') / jobs))
    ((threads)) || threads=1
fi
run+=(--epochs "$epochs")
"${run[@]}" --data-only

# --- Training --------------------------------------------------------------------------------------------------------

# Each run is a process group of its own, so that stopping this script stops all that it started.
set -m
trap 'for group in $(jobs -p); do kill -- "-$group" 2>/dev/null || true; done' EXIT
trap 'exit 130' INT TERM

train_and_score() {
    local model=$1 log=compare/$1.log seed=$2
    shift 2
    # What a row does not say is not run.sh's default.
    local plain=(--short-convolution 0 --encoder-reading whole --softmax-short-convolution 0)
    if "${run[@]}" "${plain[@]}" --model "$model" --seed "$seed" "$@" >"$log" 2>&1 </dev/null; then
        say "$model: $(tail -n 1 "$log")"
    else
        say "$model: failed; see $output/$log"
        touch compare/failed
    fi
}

# In braces, so that bash has read all of it before it starts: this takes hours, and the file may change meanwhile.
{
    mkdir -p compare
    rm -f compare/failed
    # Seed by seed: the first figures of all come before the second of any.
    for seed in "${seed_list[@]}"; do
        for row in "${chosen[@]}"; do
            read_row "$row"
            while (($(jobs -pr | wc -l) >= jobs)); do wait -n || true; done
            if ((${#extra[@]})); then
                # A row may have options for fairseq-train of its own.
                [[ " ${flags[*]} " == *" -- "* ]] || flags+=(--)
                flags+=("${extra[@]}")
            fi
            train_and_score "$name-seed$seed" "$seed" "${flags[@]}" &
        done
    done
    wait

    # The table.
    table=()
    for row in "${chosen[@]}"; do
        read_row "$row"
        table+=(--row "$attention" "$places" "$name")
    done
    [[ $venv == none ]] || python=$venv/bin/python
    "$python" "$recipe/report.py" table --output . --seeds "${seed_list[@]}" "${table[@]}"
    [[ ! -e compare/failed ]] || fail "some runs failed; they are tried again by the same command."
    exit
}
