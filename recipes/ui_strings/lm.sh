#!/usr/bin/env bash
# Usage: bash lm.sh [OPTION]... [-- FAIRSEQ_TRAIN_OPTION...]
#
# Train a language model on the text of Python's help(), which every CPython ships, evaluate it on held-out topics with
# fairseq-eval-lm, and let it continue a text. What is done already is not done again.
#
# Takes some minutes on two cores, no download, 1.7 GB of disk for the environment.

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# The attention that is trained unless options say otherwise.
default_rule="delta"
default_feature_map=dpfp
default_dpfp_nu=1
default_attention_normalization=0
default_short_convolution=0

# The model and its training, the same for every attention.
width=128
heads=4
block=256
training=(
    --task language_modeling --tokens-per-sample "$block" --sample-break-mode none --arch fwp_transformer_lm
    --decoder-layers 3 --decoder-embed-dim "$width" --decoder-ffn-embed-dim 512 --decoder-attention-heads "$heads"
    --share-decoder-input-output-embed --dropout 0.3
    --optimizer adam --adam-betas '(0.9, 0.98)' --lr 3e-3 --lr-scheduler inverse_sqrt --warmup-updates 200
    --clip-norm 1.0 --max-tokens 2048
)

common_options
option vocab-size count 2000 "pieces of the sentencepiece vocabulary"
fast_weight_options "$default_rule" "$default_feature_map" "$default_dpfp_nu" "$default_attention_normalization" \
    "$default_short_convolution"
option softmax flag 0 "softmax attention: the baseline"
option epochs count 20 "passes over the text"
option seed number 1 "seed of initialisation, order of batches, dropout, and the continuation"
option model text "" "name of the trained model, a folder in OUTPUT/models (default: made from the settings)"
option prompt text "The class statement is" "text to continue"
option length count 60 "pieces that the continuation has at most"
parse_options "$@"
check_model_name
[[ -n ${prompt//[[:space:]]/} ]] || fail "--prompt is empty."
enter_output
enter_environment

name=lm-softmax
flags=(--decoder-self-attention softmax)
if ((!softmax)); then
    check_attention "$width" "$heads"
    fast_weight_flags
    flags=(--decoder-self-attention fast-weight "${attention[@]}")
    name=lm-$rule-$feature_map
fi
flags+=(${extra[@]+"${extra[@]}"})

# --- Data ------------------------------------------------------------------------------------------------------------

make_text() {
    local part
    "$python" "$recipe/python_text.py" --output lm/text
    "$python" "$recipe/subwords.py" learn --model lm/text/spm --size "$vocab_size" lm/text/train
    for part in train valid test; do
        "$python" "$recipe/subwords.py" encode --model lm/text/spm.model "lm/text/$part" "lm/text/$part.pieces"
    done
}

# The text goes with the version of Python.
data="$("$python" --version) $(fingerprint "$recipe/python_text.py") pieces $vocab_size"
step steps/lm-text lm/text "$data" "text of Python's help()" make_text
step steps/lm-data-bin lm/data-bin "$data" "fairseq-preprocess" preprocess lm/data-bin --only-source --workers 1 \
    --trainpref lm/text/train.pieces --validpref lm/text/valid.pieces --testpref lm/text/test.pieces

# --- Training and perplexity -----------------------------------------------------------------------------------------

train_model() {
    cp lm/text/spm.model lm/data-bin/dict.txt "$folder/"
    train "$folder" lm/data-bin "${training[@]}" "${flags[@]}"
}

evaluate() {
    quietly "$folder/eval-lm.log" fairseq eval_lm lm/data-bin "${basics[@]}" --path "$folder/checkpoint_best.pt" \
        --gen-subset test --tokens-per-sample "$block" --max-tokens 2048 --log-format none >"$folder/eval-lm.out.new"
    cat -- "$folder/eval-lm.log" >>"$folder/eval-lm.out.new"
    mv -- "$folder/eval-lm.out.new" "$folder/eval-lm.out"
}

enter_model "$name" "$data" "epochs $epochs, seed $seed" "${training[*]}" "${flags[*]}"
step "$folder/.trained" "$folder/checkpoint_best.pt" "$settings" "training $folder" train_model
step "$folder/.evaluated" "$folder/eval-lm.out" "$settings" "fairseq-eval-lm on held-out topics" evaluate

# --- Continuation ----------------------------------------------------------------------------------------------------

say "model: $output/$folder"
continuation=$(
    printf '%s\n' "${prompt//[$'\n\r']/ }" |
        quietly "$folder/continue.log" fairseq interactive "$folder" "${basics[@]}" \
            --path "$folder/checkpoint_best.pt" --task fwp_language_modeling \
            --bpe sentencepiece --sentencepiece-model "$folder/spm.model" --beam 1 --nbest 1 --sampling \
            --sampling-topk 10 --temperature 0.8 --seed "$seed" \
            --min-len "$((length / 2))" --max-len-a 1 --max-len-b "$length" |
        awk -F'\t' '/^D-[0-9]+\t/ { print $3 }'
)
printf '\n%s\n\n' "$continuation"
perplexity=$(sed -n 's/.*Perplexity: \([0-9.]*\).*/\1/p' "$folder/eval-lm.out")
printf 'perplexity on held-out text = %s (per piece of a vocabulary of %s)\n' "$perplexity" "$vocab_size"
