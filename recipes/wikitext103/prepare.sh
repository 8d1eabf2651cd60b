#!/usr/bin/env bash
# Usage: bash prepare.sh [OPTION]...
#
# Get the archive of WikiText-103 and make OUTPUT/data-bin/words of it, or, with --bpe N or --sentencepiece N,
# OUTPUT/data-bin/bpe-N or sentencepiece-N. What is done already is not done again.
#
# Downloads 190 MB, unless --from names a copy.

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

common_options
archive_options
data_options
parse_options "$@"
choose_data
check_archive_options
# The checksum that torchtext has published of the archive; another place may have packed it in another way.
[[ -n $from$checksums ]] || checksums=$recipe/md5sums
enter_output
enter_environment

url=https://wikitext.smerity.com/wikitext-103-v1.zip
archive=archives/wikitext-103-v1.zip
wiki=raw/wikitext-103/wiki

# --- Text ------------------------------------------------------------------------------------------------------------

text() { "$python" "$recipe/text.py" "$@"; }

learn_pieces() {
    text "learn-${vocabulary%-*}" --jobs "$jobs" --size "${vocabulary##*-}" "pieces/$vocabulary.model" \
        "$wiki.train.tokens"
}

make_pieces() {
    local part
    mkdir -p "pieces/$vocabulary"
    for part in train valid test; do
        text encode --jobs "$jobs" --model "pieces/$vocabulary.model" "$wiki.$part.tokens" "pieces/$vocabulary/$part"
    done
}

make_binary() {
    local prefix=pieces/$vocabulary/ suffix=
    if [[ $vocabulary == words ]]; then
        prefix=$wiki. suffix=.tokens
    fi
    preprocess "$data_bin" --only-source --workers "$jobs" --trainpref "${prefix}train$suffix" \
        --validpref "${prefix}valid$suffix" --testpref "${prefix}test$suffix"
    # How many words there are, to tell the perplexity per word from that per piece.
    text count "$wiki".{train,valid,test}.tokens >"$data_bin/words.json"
}

step steps/archives archives/SHA256SUMS "$from $checksums" "archive" get_archives "$url"
digest=$(grep " ${archive##*/}\$" archives/SHA256SUMS)
step steps/extract "$wiki.test.tokens" "$digest" "extracting $archive" \
    "$python" "$repository/recipes/archives.py" extract "$archive" raw wikitext-103/wiki.{train,valid,test}.tokens
if [[ $vocabulary != words ]]; then
    digest+=" $(fingerprint "$recipe/text.py" "$recipe"/../{bpe,parallel}.py)"
    mkdir -p pieces
    step "steps/learn-$vocabulary" "pieces/$vocabulary.model" "$digest" "vocabulary of pieces" learn_pieces
    step "steps/pieces-$vocabulary" "pieces/$vocabulary" "$digest" "splitting words into pieces" make_pieces
fi
step "steps/data-bin-$vocabulary" "$data_bin" "$digest" "fairseq-preprocess" make_binary
say "data: $output/$data_bin"
