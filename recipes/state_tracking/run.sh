#!/usr/bin/env bash
# Usage: bash run.sh [OPTION]... [-- FAIRSEQ_TRAIN_OPTION...]
#
# Train small language models to say after every move where one is, on sequences of up to 40 moves, and test them on up
# to 256. OUTPUT/results.csv has the accuracies, OUTPUT/state_tracking.png draws them. What is done already is not done
# again.
#
# Takes 1 to 2 minutes of one core for each of 24 trainings, no download.

recipe=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$recipe/../common.sh"

# What is compared: name | flags of the attention.
delta="--update-rule delta --feature-map identity --key-normalization l2 --write-strength-bias"
configurations=(
    "softmax | --decoder-self-attention softmax"
    "delta, strengths to 1 | $delta"
    "delta, strengths to 2 | $delta --write-strength-range 2"
    "delta, dpfp-1, keys of sum one (the default) | --update-rule delta --feature-map dpfp"
)
lengths=(40 64 128 256)
training=(
    --task state_tracking --arch fwp_transformer_lm --decoder-layers 2 --decoder-embed-dim 64
    --decoder-ffn-embed-dim 128 --decoder-attention-heads 4 --share-decoder-input-output-embed
    --no-token-positional-embeddings --dropout 0
    --criterion label_smoothed_cross_entropy --report-accuracy --batch-size 128 --epoch-sequences 6400
    --optimizer adam --lr 3e-3 --clip-norm 1 --weight-decay 0.01 --lr-scheduler polynomial_decay --warmup-updates 100
)

common_options
option groups "some parity s3" "parity s3" "what to follow, between spaces"
option seeds "some number" "1 2 3" "seeds to train each with, between spaces"
option epochs count 10 "passes over 6,400 sequences, which are new in each"
parse_options "$@"
enter_output
enter_environment

train_one() {
    local folder=$1 subsets
    shift
    printf -v subsets 'length_%s,' "${lengths[@]}"
    rm -rf -- "$folder"
    log_training "$folder" fairseq train "$@" "${basics[@]}" --no-save --save-dir "$folder" --num-workers 0 \
        --valid-subset "${subsets%,}" --validate-interval "$epochs" --log-format simple --log-interval 50
}

for seed in $seeds; do
    for group in $groups; do
        for row in "${configurations[@]}"; do
            IFS='|' read -r name flags <<<"$row"
            read -ra flags <<<"$flags"
            folder=runs/$group/$(printf %s "${name% }" | tr -cs 'a-z0-9' -)/seed$seed
            command=("${training[@]}" --group "$group" "${flags[@]}" --max-epoch "$epochs" --seed "$seed"
                --total-num-update "$((epochs * 50))" ${extra[@]+"${extra[@]}"})
            step "$folder.done" "$folder/train.log" "${command[*]}" "$group, ${name% }, seed $seed" \
                train_one "$folder" "${command[@]}"
            printf '%s\n' "${name% }" >"$folder/name"
        done
    done
done
"$python" "$recipe/draw.py" .
