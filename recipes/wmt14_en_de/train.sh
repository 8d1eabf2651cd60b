#!/usr/bin/env bash
# Train a row of the paper's table 1. See README.md, or --help.

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# The paper: 3 GPUs, 3584 tokens each, gradients of 16 batches. The rest is the recipe that it adapts (Ott et al., 2018).
total_tokens=$((3 * 3584 * 16))
training=(
    --task translation --source-lang en --target-lang de --share-all-embeddings --attention-dropout 0
    --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 0 --weight-decay 0
    --lr 1e-3 --lr-scheduler inverse_sqrt --warmup-updates 4000 --warmup-init-lr 1e-7 --stop-min-lr 1e-9
    --criterion label_smoothed_cross_entropy --label-smoothing 0.1
    --eval-bleu --eval-tokenized-bleu --eval-bleu-remove-bpe --eval-bleu-args '{"beam": 4, "lenpen": 0.6}'
    --best-checkpoint-metric bleu --maximize-best-checkpoint-metric
)

usage() {
    cat <<END
Usage: bash train.sh ROW [OPTION]... [-- FAIRSEQ_TRAIN_OPTION...]

Train a row of table 1 on what prepare.sh has made: ${rows[*]}.
An interrupted training goes on from its last checkpoint.

Takes days on GPUs.
END
}

common_options
option size "big base" big "size of the Transformer; the paper's is big"
cluster_options fp16
option max-tokens count 3584 "tokens that a GPU takes at a time, at most"
option epochs count 45 "passes over the training pairs"
option seed number 1 "seed of initialisation, order of batches and dropout"
option model text "" "name of the trained model, a folder in OUTPUT/models (default: SIZE-ROW-seedN)"
option dry-run flag 0 "print the options for fairseq-train, one a line, and stop"
parse_options_and_words "$@"
enter_row
check_cluster_options
check_model_name
enter_prepared
enter_environment
count_processes

# The same number of tokens for an update on any number of GPUs, with as few batches on each as fit.
update_freq=$(((total_tokens + processes * max_tokens - 1) / (processes * max_tokens)))
tokens=$((total_tokens / (processes * update_freq)))
((tokens >= 512)) || fail "$processes GPUs have $tokens each of the $total_tokens tokens of an update: use fewer."

row_flags "$row"
architecture=fwp_transformer_wmt_en_de
[[ $size == base ]] || architecture+=_big
training+=(--arch "$architecture" --max-epoch "$epochs" --seed "$seed" "${flags[@]}" ${extra[@]+"${extra[@]}"})
sizes=(--max-tokens "$tokens" --update-freq "$update_freq")
if ((dry_run)); then
    printf '%s\n' "${training[@]}" "${sizes[@]}"
    exit
fi

data=$(fingerprint data-bin/dict.en.txt data-bin/train.en-de.en.idx)
keep_model "${model:-$size-$row-seed$seed}" "$row" "$size" "data $data" "${training[*]}"
cp data-bin/dict.en.txt data-bin/dict.de.txt codes "$folder/"
# The options of the recipe come first: those that were given after -- win.
step "$folder/.trained" "$folder/checkpoint_best.pt" "$settings" "training $folder" \
    log_training "$folder" distributed data-bin "${basics[@]}" --save-dir "$folder" --no-epoch-checkpoints \
    --log-format simple --log-interval 100 "${sizes[@]}" "${training[@]}"
say "model: $output/$folder"
