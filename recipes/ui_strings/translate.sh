#!/usr/bin/env bash
# Usage: bash translate.sh [OPTION]... [--] [SENTENCE]...
#
# Translate each argument, or, without arguments, each line of standard input, from English, with a model that run.sh has
# trained. Only translations are written to standard output, one a line, in the order of the input.

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

common_options
option model text "" "name of the trained model, a folder in OUTPUT/models (default: the latest without a name)"
option beam count 5 "width of the beam search"
parse_options_and_words "$@"
words+=(${extra[@]+"${extra[@]}"})
[[ -d $output ]] || fail "there is no trained model in $output: train one with run.sh first."
enter_output
if [[ -z $model && -f latest ]]; then
    folder=$(<latest)
else
    folder=models/$model
fi
target_language=xx
for file in "$folder"/dict.??.txt; do
    [[ ! -e $file || $file == */dict.en.txt ]] || target_language=${file: -6:2}
done
for file in checkpoint_best.pt spm.model dict.en.txt "dict.$target_language.txt"; do
    [[ -e $folder/$file ]] ||
        fail "there is no trained model in $output${model:+/models/$model}: train one with run.sh first."
done
enter_environment >&2

# One sentence a line, whatever white space an argument has in it.
sentences() {
    if ((${#words[@]})); then
        printf '%s\n' "${words[@]//[$'\n\r']/ }"
    else
        cat
    fi
}

buffer=64
if ((!${#words[@]})) && [[ -t 0 ]]; then
    buffer=1 # someone is typing: answer each line
    printf 'One English sentence a line; Ctrl-D ends.\n' >&2
fi

# Of what fairseq-interactive prints, the source (S) and the translation (D) of each line; nothing in, nothing out. Each
# as it comes: some kinds of awk wait until there is more.
translations() {
    local line source=
    while IFS= read -r line; do
        case $line in
        S-[0-9]*$'\t'*) source=${line#*$'\t'} ;;
        D-[0-9]*$'\t'*) printf '%s\n' "${source:+${line#*$'\t'*$'\t'}}" ;;
        esac
    done
}

log=$(mktemp)
trap 'rm -f -- "$log"' EXIT
sentences | PYTHONUNBUFFERED=1 quietly "$log" fairseq interactive "$folder" "${basics[@]}" \
    --path "$folder/checkpoint_best.pt" --task translation --source-lang en --target-lang "$target_language" \
    --beam "$beam" "${search[@]}" --buffer-size "$buffer" --batch-size "$buffer" \
    --bpe sentencepiece --sentencepiece-model "$folder/spm.model" | translations
