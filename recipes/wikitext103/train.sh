#!/usr/bin/env bash
# Train a row of the paper's tables 2 to 5. See README.md, or --help.

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<END
Usage: bash train.sh ROW [OPTION]... [-- FAIRSEQ_TRAIN_OPTION...]

Train a row of tables 2, 3 and 5 on what prepare.sh has made:
  ${truncated_rows[*]}
or of table 4, whose context goes on from segment to segment:
  ${streaming_rows[*]}
An interrupted training goes on from its last checkpoint.

Takes days on GPUs.
END
}

common_options
option size "small medium" small "size of the model"
data_options
cluster_options fp32
option update-freq count 1 "batches of a GPU that make up an update, for a GPU that cannot take its share at once"
option epochs count "" "passes over the text (default: 120 for small models, 70 for medium ones)"
option seed number 1 "seed of initialisation, order of batches and dropout"
option model text "" "name of the trained model, a folder in OUTPUT/models (default: SIZE-ROW-seedN)"
option dry-run flag 0 "print the options for fairseq-train, one a line, and stop"
parse_options_and_words "$@"
enter_row
check_cluster_options
check_model_name
choose_data
[[ $row != xl-* || $size == medium ]] || fail "row $row is for --size medium, as in table 4."
row_flags "$row"
[[ $task == language_modeling ]] || ((update_freq == 1)) ||
    fail "--update-freq is $update_freq: row $row reads the text in its order, a segment for each update."
enter_prepared
enter_environment
count_processes

# --- Settings --------------------------------------------------------------------------------------------------------

# Appendix D.3 and F of the paper; updates, warm-up of Transformer-XL and clipping are the authors' scripts'.
warmup=$(configured warmup_updates) updates=$(configured max_update) batch=$(configured batch_size)
epochs=${epochs:-$(configured max_epoch)}
[[ $row != xl-* ]] || warmup=1000 updates=200000
share=$((batch / (processes * update_freq)))
((share * processes * update_freq == batch)) ||
    fail "$processes GPUs with --update-freq $update_freq cannot share $batch segments evenly: their product must divide it."

# Words have the architecture's adaptive softmax; pieces what their number allows of it.
criterion=adaptive_loss
if [[ $vocabulary != words ]]; then
    types=$(($(wc -l <"$data_bin/dict.txt") + 4))
    cutoffs=
    for cutoff in 20000 40000 200000; do
        ((cutoff >= types)) || cutoffs+=${cutoffs:+,}$cutoff
    done
    if [[ -n $cutoffs ]]; then
        model_flags+=(--adaptive-input-cutoff "$cutoffs" --adaptive-softmax-cutoff "$cutoffs")
    else
        [[ $row != xl-* ]] || fail "row $row needs a vocabulary of more than 20000 pieces."
        criterion=cross_entropy
        architecture=fwp_transformer_lm
        model_flags+=(--decoder-layers 16 --decoder-embed-dim "$(configured decoder_embed_dim)" --decoder-ffn-embed-dim 2048
            --decoder-attention-heads 8 --dropout 0.1 --no-attention-bias --share-decoder-input-output-embed)
    fi
fi

# fairseq's adaptive loss wants this kind of data parallelism.
training=(
    --task "$task" --tokens-per-sample "$segment" --arch "$architecture" "${model_flags[@]}"
    --criterion "$criterion" --ddp-backend legacy_ddp --optimizer adam --adam-betas '(0.9, 0.999)' --clip-norm 0.25
    --lr 2.5e-4 --lr-scheduler cosine --warmup-updates "$warmup" --max-update "$updates" --max-epoch "$epochs"
    --seed "$seed"
)
training+=(${extra[@]+"${extra[@]}"})
sizes=(--batch-size "$share" --update-freq "$update_freq")
if ((dry_run)); then
    printf '%s\n' "${training[@]}" "${sizes[@]}"
    exit
fi

# --- Training --------------------------------------------------------------------------------------------------------

name=$size-$row-seed$seed
[[ $vocabulary == words ]] || name=$size-$row-$vocabulary-seed$seed
data=$(fingerprint "$data_bin/dict.txt" "$data_bin/train.idx")
keep_model "${model:-$name}" "$row" "$size" "$vocabulary" "$task" "$segment" "data $data" "${training[*]}"
cp "$data_bin/dict.txt" "$folder/"
step "$folder/.trained" "$folder/checkpoint_best.pt" "$settings" "training $folder" \
    log_training "$folder" distributed "$data_bin" "${basics[@]}" --save-dir "$folder" --no-epoch-checkpoints \
    --log-format simple --log-interval 200 "${sizes[@]}" "${training[@]}"
say "model: $output/$folder"
