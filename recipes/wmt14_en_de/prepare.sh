#!/usr/bin/env bash
# Usage: bash prepare.sh [OPTION]...
#
# Get the archives of WMT14, and make OUTPUT/data-bin of them: newstest2013 is the validation part, newstest2014 the
# test. What is done already is not done again.
#
# Downloads about 1.7 GB, unless --from names a copy.

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

common_options
archive_options
option news-commentary "v12 v9" v12 "version of News Commentary: v9 is WMT14's own, v12 what fairseq's recipe has"
option merges count 32000 "byte-pair merges of both languages together"
parse_options "$@"
check_archive_options
enter_output
enter_environment

# --- Archives --------------------------------------------------------------------------------------------------------

# Each address, and the files that are wanted of it.
news=https://data.statmt.org/wmt17/translation-task/training-parallel-nc-v12.tgz
[[ $news_commentary == v12 ]] || news=https://www.statmt.org/wmt14/training-parallel-nc-v9.tgz
corpora=(training/europarl-v7.de-en commoncrawl.de-en "training/news-commentary-$news_commentary.de-en")
tests=test-full/newstest2014-deen
sources=(
    "https://www.statmt.org/wmt13/training-parallel-europarl-v7.tgz ${corpora[0]}.en ${corpora[0]}.de"
    "https://www.statmt.org/wmt13/training-parallel-commoncrawl.tgz ${corpora[1]}.en ${corpora[1]}.de"
    "$news ${corpora[2]}.en ${corpora[2]}.de"
    "https://data.statmt.org/wmt17/translation-task/dev.tgz dev/newstest2013.en dev/newstest2013.de"
    "https://www.statmt.org/wmt14/test-full.tgz $tests-src.en.sgm $tests-ref.de.sgm"
)

step steps/archives archives/SHA256SUMS "$from $checksums $news" "archives" get_archives "${sources[@]%% *}"
digests=
for source in "${sources[@]}"; do
    read -ra members <<<"${source#* }"
    archive=${source%% *}
    archive=${archive##*/}
    digest=$(grep " $archive\$" archives/SHA256SUMS)
    digests+=" $digest"
    step "steps/extract-$archive" "raw/${members[1]}" "$digest" "extracting $archive" \
        "$python" "$repository/recipes/archives.py" extract "archives/$archive" raw "${members[@]}"
done

# --- Text ------------------------------------------------------------------------------------------------------------

corpus() { "$python" "$recipe/corpus.py" "$@"; }

# As in fairseq's recipe the test is tokenised but its punctuation not normalised; and so is newstest2013, a test too.
tokenize_tests() {
    local language part
    mkdir -p references
    corpus segments "raw/$tests-src.en.sgm" references/test.en
    corpus segments "raw/$tests-ref.de.sgm" references/test.de
    for language in en de; do
        cp -- "raw/dev/newstest2013.$language" "references/valid.$language"
        for part in valid test; do
            corpus tokenize --no-normalize --lang "$language" "references/$part.$language" "tokens/$part.$language"
        done
    done
}

apply_bpe() {
    corpus apply-bpe --jobs "$jobs" --codes codes "tokens/$1" "pieces/$1"
}

apply_bpe_to_tests() {
    local file
    for file in {valid,test}.{en,de}; do
        apply_bpe "$file"
    done
}

mkdir -p tokens pieces clean
text="$(fingerprint "$recipe/corpus.py" "$recipe"/../{bpe,parallel}.py)$digests"
for language in en de; do
    inputs=("${corpora[@]/#/raw/}")
    step "steps/tokens-$language" "tokens/train.$language" "$text" "tokenising the $language side of the training text" \
        corpus tokenize --jobs "$jobs" --lang "$language" "${inputs[@]/%/.$language}" "tokens/train.$language"
done
step steps/tokens-tests tokens/test.de "$text" "tokenising newstest2013 and newstest2014" tokenize_tests
text+=" merges $merges"
step steps/codes codes "$text" "byte-pair merges" \
    corpus learn-bpe --jobs "$jobs" --merges "$merges" codes tokens/train.en tokens/train.de
for language in en de; do
    step "steps/pieces-$language" "pieces/train.$language" "$text" "splitting the $language side into pieces" \
        apply_bpe "train.$language"
done
step steps/pieces-tests pieces/test.de "$text" "splitting newstest2013 and newstest2014 into pieces" apply_bpe_to_tests
step steps/clean clean/train.de "$text" "leaving out pairs that are empty, too long or out of proportion" \
    corpus clean pieces/train.en pieces/train.de clean/train.en clean/train.de
step steps/data-bin data-bin "$text" "fairseq-preprocess" preprocess data-bin --source-lang en --target-lang de \
    --joined-dictionary --nwordssrc 32768 --nwordstgt 32768 --workers "$jobs" --trainpref clean/train \
    --validpref pieces/valid --testpref pieces/test
say "data: $output/data-bin"
