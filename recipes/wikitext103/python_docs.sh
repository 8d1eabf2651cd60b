#!/usr/bin/env bash
# Kinds of attention compared on real text, with a budget of time for each. See README.md, or --help.

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
recipe_name=python_docs

# What is compared, and the model and its training, the same for each.
docs_rows=(
    softmax sum-elu delta-elu delta-dpfp-1 gated-delta-elu gated-delta-elu-conv
    sum-elu-streaming delta-elu-streaming delta-dpfp-1-streaming gated-delta-elu-streaming
)
# What can be compared besides, by --only.
further_rows=()
for row in "${rows[@]}"; do
    [[ $row == xl-* || " ${docs_rows[*]} " == *" $row "* ]] || further_rows+=("$row")
done
size=small
# Fast weights that are made of the softmax row, which is to be trained before.
converted_rows=(converted-sum converted-delta converted-gated-delta)
# What goes on from the trained row of that name, a streaming one from its truncated one, to a learning rate of zero.
continued_rows=(continued-softmax continued-gated-delta-elu-conv continued-gated-delta-elu-conv-streaming)
rows=("${docs_rows[@]}" "${further_rows[@]}" "${converted_rows[@]}" "${continued_rows[@]}")
segment=128
training=(
    --tokens-per-sample "$segment" --arch fwp_transformer_lm
    --decoder-layers 4 --decoder-embed-dim 128 --decoder-ffn-embed-dim 512 --decoder-attention-heads 8
    --share-decoder-input-output-embed --dropout 0.2
    --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 0.25
    --lr 2e-3 --lr-scheduler inverse_sqrt --warmup-updates 400 --batch-size 16
)

usage() {
    cat <<END
Usage: bash python_docs.sh [OPTION]... [-- FAIRSEQ_TRAIN_OPTION...]

Train small language models on the documentation that every CPython ships, each for the same time, on the processor or
the first GPU; evaluate them as evaluate.sh does, and print a table, which is written to OUTPUT/python_docs.md, too:
  ${docs_rows[*]}
and, if --only names them:
  ${further_rows[*]}
or begin with the trained softmax row and make fast weights of its attention, with a feature map that learns to:
  ${converted_rows[*]}
or begin with the trained row of that name, a streaming one with its truncated one, and go on for 976 updates, at whose
end the learning rate is zero:
  ${continued_rows[*]}
What is done already is not done again.

Takes --minutes for each, a fifth of that for those that are converted, one at a time, and no download.
END
}

common_options
option minutes count 30 "minutes of training of each model"
option pieces count 4000 "pieces of the sentencepiece vocabulary"
option only "some ${rows[*]}" "" "names of what to train, between spaces (default: all of the first list)"
option seed number 1 "seed of initialisation, order of batches and dropout"
option window count "" "tokens of the window in evaluation (default: $segment)"
option batch-size count 64 "windows to compute at once"
option cpu flag 0 "train and evaluate on the processor, even if there is a GPU"
parse_options "$@"
enter_output
enter_environment

# --- Data ------------------------------------------------------------------------------------------------------------

text() { "$python" "$recipe/text.py" "$@"; }

make_text() {
    local part
    "$python" "$recipe/python_docs.py" --output text
    text learn-sentencepiece --size "$pieces" text/spm.model text/train
    for part in train valid test; do
        text encode --model text/spm.model "text/$part" "text/$part.pieces"
    done
}

vocabulary=sentencepiece-$pieces
data_bin=data-bin/$vocabulary

make_binary() {
    preprocess "$data_bin" --only-source --workers 1 --trainpref text/train.pieces \
        --validpref text/valid.pieces --testpref text/test.pieces
    text count text/{train,valid,test} >"$data_bin/words.json"
}

# The text goes with the version of Python.
data="$("$python" --version) $(fingerprint "$recipe"/{python_docs,text}.py "$recipe/../ui_strings/python_text.py")"
data+=" pieces $pieces"
step steps/text text "$data" "documentation of Python" make_text
step "steps/data-bin-$vocabulary" "$data_bin" "$data" "fairseq-preprocess" make_binary

# --- Training and evaluation -----------------------------------------------------------------------------------------

device=()
((!cpu)) || device=(--cpu)
chosen=()
for row in ${only:-"${docs_rows[@]}"}; do
    share=1
    # Where a training goes on, its learning rate is low.
    case $row in
    converted-*)
        share=5
        # The projections keep their biases.
        row_flags "${row#converted-}-elu"
        model_flags+=(--feature-map learned --finetune-from-model "models/softmax-seed$seed/checkpoint_best.pt"
            --convert-attention --lr 1e-3 --warmup-updates 50)
        ;;
    continued-*)
        # As long as it takes for the learning rate to come to its end.
        share=0
        parent=${row#continued-}
        row_flags "$parent"
        model_flags+=(--no-attention-bias --finetune-from-model "models/${parent%-streaming}-seed$seed/checkpoint_best.pt"
            --lr 1e-3 --lr-scheduler cosine --warmup-updates 100 --max-update 976)
        ;;
    *)
        row_flags "$row"
        model_flags+=(--no-attention-bias)
        ;;
    esac
    segment=${training[1]}
    flags=(--task "$task" "${training[@]}" "${model_flags[@]}" --seed "$seed" ${extra[@]+"${extra[@]}"})
    keep_model "$row-seed$seed" "$row" docs "$vocabulary" "$task" "$segment" "$data" "minutes $minutes" "${flags[*]}"
    hours=$(awk -v minutes="$minutes" -v share="$share" 'BEGIN { printf "%.4f", share ? minutes / share / 60 : 0 }')
    # An interrupted training goes on from its last epoch, with what was left of the time then.
    step "$folder/.trained" "$folder/checkpoint_best.pt" "$settings" "training $folder" \
        log_training "$folder" fairseq train "$data_bin" "${basics[@]}" --save-dir "$folder" --no-epoch-checkpoints \
        --distributed-world-size 1 --num-workers 0 --log-format simple --log-interval 200 --stop-time-hours "$hours" \
        ${device[@]+"${device[@]}"} "${flags[@]}"
    chosen+=("$folder")
done
options=(${device[@]+"${device[@]}"})
evaluate_models
"$python" "$recipe/tables.py" docs . --rows "${rows[@]}"
