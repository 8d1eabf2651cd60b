#!/usr/bin/env bash
# Usage: bash evaluate.sh [MODEL]... [OPTION]... [-- FAIRSEQ_GENERATE_OPTION...]
#
# Translate with the models of these names, or with all that train.sh has finished, and print tokenised BLEU with compounds
# split, as the literature has it, and sacreBLEU of the detokenised text with its signature. What is done already is not
# done again.
#
# Takes some minutes for each model, on two cores too (by estimate).

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

common_options
option beam count 4 "width of the beam search"
option lenpen text 0.6 "length penalty"
option max-tokens count 8000 "tokens to translate at a time, at most"
option precision "fp32 fp16" fp32 "number format on a GPU"
option cpu flag 0 "translate on the processor"
parse_options_and_words "$@"
[[ $lenpen =~ ^-?[0-9]+(\.[0-9]+)?$ ]] || fail "--lenpen is '$lenpen', it must be a number."
enter_prepared
choose_models
enter_environment

options=(--beam "$beam" --lenpen "$lenpen" --max-tokens "$max_tokens" --remove-bpe --log-format none)
((!cpu)) || options+=(--cpu)
[[ $precision == fp32 ]] || options+=(--fp16)
options+=(${extra[@]+"${extra[@]}"})

translate() {
    local part
    for part in valid test; do
        quietly "$folder/$part.log" fairseq generate data-bin "${basics[@]}" --path "$folder/checkpoint_best.pt" \
            --gen-subset "$part" "${options[@]}" >"$folder/$part.out.new"
        mv -- "$folder/$part.out.new" "$folder/$part.out"
    done
    "$python" "$recipe/score.py" "$folder" --references references --tokens tokens
}

for folder in "${chosen[@]}"; do
    step "$folder/.evaluated" "$folder/result.json" "$(fingerprint "$folder/checkpoint_best.pt") ${options[*]}" \
        "translating with $folder" translate
    cat -- "$folder/result.txt"
done
