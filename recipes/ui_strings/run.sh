#!/usr/bin/env bash
# Usage: bash run.sh [OPTION]... [-- FAIRSEQ_TRAIN_OPTION...]
#
# Collect user-interface strings in English and German, train a translation model on them, and score it on held-out
# strings. What is done already is not done again. The last line is BLEU = NN.N.
#
# Takes 10 minutes on two cores, 88 MB to download, 1.8 GB of disk, most of it the environment.

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# The attention that is trained unless options say otherwise.
default_rule="gated-delta"
default_feature_map=dpfp
default_dpfp_nu=1
default_attention_normalization=0
default_short_convolution=4
default_encoder_self_attention=fast-weight
default_encoder_reading=two-directions
default_decoder_self_attention=fast-weight
default_cross_attention=softmax
default_softmax_short_convolution=4

# The model and its training, the same for every attention.
width=128
heads=4
training=(
    --task translation --arch fwp_transformer
    --encoder-layers 2 --encoder-embed-dim "$width" --encoder-ffn-embed-dim 512 --encoder-attention-heads "$heads"
    --decoder-layers 2 --decoder-embed-dim "$width" --decoder-ffn-embed-dim 512 --decoder-attention-heads "$heads"
    --share-all-embeddings --dropout 0.1
    --optimizer adam --adam-betas '(0.9, 0.98)' --lr-scheduler fixed --warmup-updates 400
    --criterion label_smoothed_cross_entropy --label-smoothing 0.1 --max-tokens 2048
)
peak_learning_rate=3e-3
search+=(--beam 5)

# One learning rate for each epoch: the peak in the first 30 %, then down to near zero along a line, so that a training
# of any length arrives there.
learning_rates() {
    awk -v epochs="$epochs" -v peak="$peak_learning_rate" 'BEGIN {
        for (epoch = 1; epoch <= epochs; epoch++) {
            left = (epochs - epoch + 0.5) / (0.7 * epochs)
            rate = left < 1 ? peak * left : peak
            printf "%s%.3g", separator, rate
            separator = ","
        }
    }'
}

common_options
option cache text "${XDG_CACHE_HOME:-$HOME/.cache}/fwp-fairseq/wheels" "folder for downloaded wheels"
option wheels text "" "take the strings from the wheels in this folder, download none"
option target-language text de "language to translate into: de or fr, or another of two letters that the wheels have"
option vocab-size count 4000 "pieces of the sentencepiece vocabulary that both languages share"
option valid-size count 500 "pairs for validation"
option test-size count 500 "pairs for the score"
fast_weight_options "$default_rule" "$default_feature_map" "$default_dpfp_nu" "$default_attention_normalization" \
    "$default_short_convolution"
places="softmax fast-weight"
option encoder-self-attention "$places" "$default_encoder_self_attention" "attention within the encoder"
option encoder-reading "whole two-directions" "$default_encoder_reading" "how fast weights are read within the encoder"
option decoder-self-attention "$places" "$default_decoder_self_attention" "causal attention within the decoder"
option cross-attention "$places" "$default_cross_attention" "attention of the decoder to the encoder"
option softmax-short-convolution number "$default_softmax_short_convolution" \
    "width of a convolution where attention is softmax; 0: none"
option softmax flag 0 "softmax in all three places: the baseline"
option epochs count 18 "passes over the training pairs"
option seed number 1 "seed of initialisation, order of batches and dropout"
option model text "" "name of the trained model, a folder in OUTPUT/models (default: made from the settings)"
option data-only flag 0 "stop before the training"
parse_options "$@"
check_model_name
check_target_language
((softmax_short_convolution == 0 || (softmax_short_convolution >= 2 && softmax_short_convolution <= 16))) ||
    fail "--softmax-short-convolution is $softmax_short_convolution, allowed is 0, for none, or 2 to 16."
[[ -z $wheels || -d $wheels ]] || fail "--wheels $wheels is not a folder."
[[ -z $wheels ]] || wheels=$(cd -- "$wheels" && pwd)
[[ $cache == /* ]] || cache=$PWD/$cache
if ((softmax)); then
    encoder_self_attention=softmax decoder_self_attention=softmax cross_attention=softmax
fi
enter_output
enter_environment

# --- The attention ---------------------------------------------------------------------------------------------------

flags=()
name=softmax
if [[ "$encoder_self_attention $decoder_self_attention $cross_attention" == *fast-weight* ]]; then
    ((data_only)) || check_attention "$width" "$heads"
    fast_weight_flags
    flags=("${attention[@]}")
    [[ $encoder_self_attention == softmax ]] || flags+=(--encoder-reading "$encoder_reading")
    name=$rule-$feature_map
fi
[[ "$encoder_self_attention $decoder_self_attention $cross_attention" != *softmax* ]] || ((!softmax_short_convolution)) ||
    flags+=(--softmax-short-convolution "$softmax_short_convolution")
flags+=(--encoder-self-attention "$encoder_self_attention" --decoder-self-attention "$decoder_self_attention"
    --cross-attention "$cross_attention" ${extra[@]+"${extra[@]}"})

training+=(--source-lang en --target-lang "$target_language" --lr "$(learning_rates)")

# --- Data ------------------------------------------------------------------------------------------------------------

collect() {
    local source=(--cache "$cache")
    [[ -z $wheels ]] || source=(--wheels "$wheels")
    "$python" "$recipe/collect.py" "${source[@]}" --output corpus --target-language "$target_language" \
        --valid-size "$valid_size" --test-size "$test_size"
}

make_text() {
    local part language subwords=$recipe/subwords.py
    mkdir -p text
    "$python" "$subwords" learn --model text/spm --size "$vocab_size" corpus/train.en "corpus/train.$target_language"
    for part in train valid test; do
        for language in en "$target_language"; do
            "$python" "$subwords" encode --model text/spm.model "corpus/$part.$language" "text/$part.$language"
        done
    done
}

sources=("$recipe/packages.tsv")
if [[ -n $wheels ]]; then
    compgen -G "$wheels/*.whl" >/dev/null || fail "--wheels $wheels holds no .whl file."
    sources=("$wheels"/*.whl)
fi
step steps/corpus corpus \
    "$(fingerprint "$recipe/collect.py" "${sources[@]}") $target_language valid $valid_size test $test_size" "collecting strings" collect
corpus=$(fingerprint corpus/corpus.json)
step steps/text text "$corpus pieces $vocab_size" "sentencepiece vocabulary" make_text
step steps/data-bin data-bin "$corpus pieces $vocab_size" "fairseq-preprocess" preprocess data-bin --workers 1 \
    --source-lang en --target-lang "$target_language" --joined-dictionary --trainpref text/train --validpref text/valid \
    --testpref text/test
((!data_only)) || exit 0

# --- Training and score ----------------------------------------------------------------------------------------------

train_model() {
    # A model folder holds all that translate.sh needs, whatever becomes of the data.
    cp text/spm.model data-bin/dict.en.txt "data-bin/dict.$target_language.txt" "$folder/"
    train "$folder" data-bin "${training[@]}" "${flags[@]}"
}

translate_test() {
    quietly "$folder/test.log" fairseq generate data-bin "${basics[@]}" --path "$folder/checkpoint_best.pt" \
        --gen-subset test --batch-size 100 "${search[@]}" --remove-bpe sentencepiece --scoring sacrebleu \
        --log-format none >"$folder/test.out.new"
    mv -- "$folder/test.out.new" "$folder/test.out"
    "$python" "$recipe/report.py" result "$folder"
}

enter_model "$name" "corpus $corpus, $vocab_size pieces" "epochs $epochs, seed $seed" "${training[*]}" "${flags[*]}"
step "$folder/.trained" "$folder/checkpoint_best.pt" "$settings" "training $folder" train_model
step "$folder/.scored" "$folder/result.json" "$settings ${search[*]}" "translating the test strings" translate_test
if [[ -z $model ]]; then
    printf '%s\n' "$folder" >"latest.$$"
    mv -- "latest.$$" latest
fi

say "model: $output/$folder"
"$python" "$recipe/report.py" samples "$folder"
