# shellcheck shell=bash
# What prepare.sh, train.sh, evaluate.sh and table1.sh share. To be sourced by them, with bash.

recipe=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$recipe/../common.sh"
. "$recipe/../paper.sh"

# The rows of table 1, with what each is to fairseq-train: all attention of the model in each place.
everywhere=(--encoder-self-attention fast-weight --decoder-self-attention fast-weight --cross-attention fast-weight)
# The linear Transformer of the paper: sum rule, and the weighted mean that attention normalisation makes of it.
sum=(--update-rule sum --attention-normalization --key-normalization none "${everywhere[@]}")
rows=(softmax elu favor-32 favor-128 favor-256 dpfp-2 dpfp-4)

# row_flags ROW: set flags=().
row_flags() {
    case $1 in
    softmax) flags=("${everywhere[@]//fast-weight/softmax}") ;;
    elu) flags=("${sum[@]}" --feature-map elu) ;;
    favor-*) flags=("${sum[@]}" --feature-map favor --favor-features "${1#favor-}") ;;
    dpfp-*) flags=("${sum[@]}" --feature-map dpfp --dpfp-nu "${1#dpfp-}") ;;
    esac
}

# Go to where prepare.sh has been.
enter_prepared() {
    [[ -f $output/data-bin/dict.en.txt ]] || fail "there is no data in $output: make it with prepare.sh first."
    enter_output
}
