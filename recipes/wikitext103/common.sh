# shellcheck shell=bash
# What prepare.sh, train.sh, evaluate.sh and tables.sh share. To be sourced by them, with bash.

recipe=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$recipe/../common.sh"
. "$recipe/../paper.sh"

# --- Rows ------------------------------------------------------------------------------------------------------------

# What the rows of tables 2, 3 and 5 are called, and some with a rule that also forgets.
truncated_rows=(
    softmax sum-elu delta-elu sum-favor delta-favor sum-favor-16 delta-favor-16 sum-dpfp-1 delta-dpfp-1
    delta-elu-attnorm delta-elu-nopos delta-elu-nopos-attnorm gated-delta-elu gated-delta-elu-conv
)
# Table 4: the context is carried from segment to segment. The number of a Transformer-XL is its segment's and memory's.
streaming_rows=(
    sum-elu-streaming delta-elu-streaming delta-dpfp-1-streaming gated-delta-elu-streaming gated-delta-elu-conv-streaming
    xl-8 xl-64 xl-128 xl-384
)
rows=("${truncated_rows[@]}" "${streaming_rows[@]}")

# configured KEY: a value of config/$size.yaml.
configured() { sed -n "s/^  $1: //p" "$recipe/config/$size.yaml"; }

# row_flags ROW: of this row with the $size, set what it is to fairseq-train: architecture=, model_flags=(), task=, and
# segment=, the tokens of a segment. The files in config say it, for fairseq-hydra-train too, but of Transformer-XL.
row_flags() {
    local row=$1 key value
    architecture=fwp_transformer_lm_wiki103_$size
    task=language_modeling
    segment=$(configured tokens_per_sample)
    model_flags=()
    if [[ $row == xl-* ]]; then
        segment=${row#xl-}
        architecture=transformer_xl_wiki103_$size
        task=streaming_language_modeling
        model_flags=(--memory-length "$segment")
        return
    fi
    while IFS=': ' read -r key value; do
        case $key=$value in
        '#'* | *=) ;;
        _name=*) task=$value ;;
        *=true) model_flags+=("--${key//_/-}") ;;
        *) model_flags+=("--${key//_/-}" "$value") ;;
        esac
    done <"$recipe/config/row/$row.yaml"
    # As many features as a head has dimensions.
    [[ $row != *-favor ]] || model_flags+=(--favor-features "$(configured favor_features)")
}

# --- Data ------------------------------------------------------------------------------------------------------------

# There are words, and pieces of several vocabularies, side by side.
data_options() {
    option bpe number 0 "byte-pair merges; 0: none of them"
    option sentencepiece number 0 "sentencepiece pieces; 0: none of them"
}

# Set data_bin to the folder that these options name, and vocabulary to what it is called.
choose_data() {
    ((!bpe || !sentencepiece)) || fail "--bpe and --sentencepiece exclude each other."
    vocabulary=words
    ((!bpe)) || vocabulary=bpe-$bpe
    ((!sentencepiece)) || vocabulary=sentencepiece-$sentencepiece
    data_bin=data-bin/$vocabulary
}

enter_prepared() {
    [[ -f $output/$data_bin/dict.txt ]] || fail "there is no data in $output/$data_bin: make it with prepare.sh first."
    enter_output
}

# Go to where train.sh has been, with chosen=() the models.
enter_trained() {
    [[ -d $output/models ]] || fail "there is no trained model in $output: train one with train.sh first."
    enter_output
    choose_models
}

# Evaluate the model $folder on both parts, with $batch_size windows at once and the further $options.
evaluate() {
    local part command
    for part in valid test; do
        command=("$recipe/sliding_window.py" "$data_bin" --user-dir "$user_dir" --window "$segment"
            --batch-size "$batch_size")
        # One pass over the text, whose state goes on from segment to segment.
        [[ $task != streaming_language_modeling ]] || command=(-m fwp_fairseq.eval_lm "$data_bin" "${basics[@]}"
            --tokens-per-sample "$segment" --batch-size 1)
        command+=(--path "$folder/checkpoint_best.pt" --gen-subset "$part" ${options[@]+"${options[@]}"})
        PYTHONWARNINGS=ignore "$python" "${command[@]}" >"$folder/$part.out.new" 2>"$folder/$part.log" || {
            tail -n 5 -- "$folder/$part.log" >&2
            fail "the evaluation of $folder failed (all of its messages: $output/$folder/$part.log)."
        }
        mv -- "$folder/$part.out.new" "$folder/$part.out"
    done
    "$python" "$recipe/tables.py" result "$folder" --data "$data_bin"
}

# Evaluate the models chosen=() that are not yet, with a $window that is not their own if it is not empty.
evaluate_models() {
    local size
    for folder in "${chosen[@]}"; do
        { read -r row && read -r size && read -r vocabulary && read -r task && read -r segment; } <"$folder/settings"
        segment=${window:-$segment}
        data_bin=data-bin/$vocabulary
        step "$folder/.evaluated" "$folder/result.json" "$(fingerprint "$folder/checkpoint_best.pt") window $segment ${options[*]-}" \
            "evaluating $folder" evaluate
        "$python" "$recipe/tables.py" show "$folder"
    done
}
