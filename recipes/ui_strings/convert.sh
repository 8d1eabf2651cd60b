#!/usr/bin/env bash
# Make fast weights of trained softmax attention: parent, converted, finetuned, from scratch. See README.md.

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# What reads most like softmax attention.
options=(--rule sum --feature-map learned --key-normalization none --attention-normalization --encoder-self-attention softmax
    --encoder-reading whole --softmax-short-convolution 0)
features=(--learned-features 128)
# Of two options the later one counts. 64 slots have as many numbers as a memory of 128 features.
everywhere=(--encoder-self-attention fast-weight --cross-attention fast-weight)
slots=(--encoder-slots 64 --cross-slots 64)
# Of the finetuning: its learning rates, one for each epoch, and updates until the first is reached.
rates=1e-3,1e-4
epochs_after=2
schedule=(--conversion-updates 100 --warmup-updates 30)

usage() {
    cat <<END
Usage: bash convert.sh [OPTION]... [-- FAIRSEQ_TRAIN_OPTION...]

Train a model with softmax attention with run.sh, make fast weights of its decoder self-attention, and of the attention
in all three places, and finetune these for $epochs_after epochs. Train the same from scratch, for as long. What is done
already is not done again. The table is printed and written to OUTPUT/convert.md and OUTPUT/convert.csv. What follows --
is for the finetuning.

Takes 40 minutes of two cores for each seed, by estimate, 88 MB to download, 1.8 GB of disk, most of it the environment.
END
}

common_options
several_runs_options
option epochs count 18 "passes over the training pairs of the model with softmax attention"
parse_options "$@"
enter_several_runs
# The conversion's updates are an epoch and a half.
epochs_in_all=$((epochs + 2 + epochs_after))

# convert PLACES OPTION...: make fast weights of the parent with this seed, as PLACES-converted-seedN after an update that
# changes nothing, and as PLACES-finetuned-seedN.
convert() {
    local places=$1
    shift
    local more=(--finetune-from-model "models/softmax-seed$seed/checkpoint_best.pt" --convert-attention "${schedule[@]}"
        "${features[@]}")
    [[ $places != all ]] || more+=("${slots[@]}")
    more+=(${extra[@]+"${extra[@]}"})
    "${run[@]}" --model "$places-converted-seed$seed" --seed "$seed" --epochs 1 "${options[@]}" "$@" -- \
        "${more[@]}" --lr 0 --max-update 1
    "${run[@]}" --model "$places-finetuned-seed$seed" --seed "$seed" --epochs "$epochs_after" "${options[@]}" "$@" -- \
        "${more[@]}" --lr "$rates"
}

# from_scratch PLACES OPTION...: train PLACES-scratch-seedN, the same without a parent.
from_scratch() {
    local places=$1 more=("${features[@]}")
    shift
    [[ $places != all ]] || more+=("${slots[@]}")
    "${run[@]}" --model "$places-scratch-seed$seed" --seed "$seed" --epochs "$epochs_in_all" "${options[@]}" "$@" -- \
        "${more[@]}"
}

for seed in "${seed_list[@]}"; do
    "${run[@]}" --model "softmax-seed$seed" --seed "$seed" --epochs "$epochs" --softmax --softmax-short-convolution 0
    convert decoder
    convert all "${everywhere[@]}"
done
# What takes longest comes last.
for seed in "${seed_list[@]}"; do
    from_scratch decoder
    from_scratch all "${everywhere[@]}"
done

[[ $venv == none ]] || python=$venv/bin/python
"$python" "$recipe/report.py" table --output . --name convert --seeds "${seed_list[@]}" \
    --row softmax nowhere softmax \
    --row converted "decoder self-attention" decoder-converted \
    --row "converted and finetuned" "decoder self-attention" decoder-finetuned \
    --row "from scratch" "decoder self-attention" decoder-scratch \
    --row converted "all three places" all-converted \
    --row "converted and finetuned" "all three places" all-finetuned \
    --row "from scratch" "all three places" all-scratch
