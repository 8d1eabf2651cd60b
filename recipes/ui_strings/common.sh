# shellcheck shell=bash
# What run.sh, translate.sh, compare.sh and lm.sh share, beyond what all recipes share.
# To be sourced by them, with bash.

recipe=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$recipe/../common.sh"

# How sentences are searched for, but for the beam.
search=(--max-len-a 2 --max-len-b 20)

# --- Fast weights ----------------------------------------------------------------------------------------------------

# registered FILE CLASS: the names of what is registered there, for options that are checked before there is a Python
# environment that could say them (python -m fwp_fairseq --list).
registered() {
    tr -d '\n' <"$repository/fwp_fairseq/ops/$1.py" | grep -o "$2( *\"[a-z-]*\"" | cut -d '"' -f 2 | paste -s -d ' '
}

# fast_weight_options RULE FEATURE_MAP NU ATTENTION_NORMALIZATION WIDTH: declare the options of the attention.
fast_weight_options() {
    option rule "$(registered update_rules UpdateRule)" "$1" "update rule of the fast weights"
    option feature-map "$(registered feature_maps FeatureMap)" "$2" "feature map of keys and queries"
    option dpfp-nu count "$3" "nu of DPFP"
    option favor-features count 64 "m of FAVOR+"
    option key-normalization "sum l2 none" sum "how feature-mapped keys and queries are scaled"
    option attention-normalization flag "$4" "divide what is read by the accumulated keys"
    option short-convolution number "$5" "width of a convolution over queries, keys and values; 0: none"
}

# Sets attention=(), the flags of the fast-weight options for fairseq-train.
fast_weight_flags() {
    attention=(--update-rule "$rule" --feature-map "$feature_map" --key-normalization "$key_normalization")
    case $feature_map in
    dpfp) attention+=(--dpfp-nu "$dpfp_nu") ;;
    favor) attention+=(--favor-features "$favor_features") ;;
    esac
    ((!attention_normalization)) || attention+=(--attention-normalization)
    ((!short_convolution)) || attention+=(--short-convolution "$short_convolution")
}

# check_attention WIDTH HEADS: let the package say, before any work is done, whether it can build such an attention.
check_attention() {
    local options=("$@" "$rule" "$feature_map" "$key_normalization" "$dpfp_nu" "$favor_features")
    options+=("$attention_normalization" "$short_convolution")
    [[ ! -f steps/attention || $(<steps/attention) != "${options[*]}" ]] || return 0
    (cd -- "$repository" && "$python" - "$(basename "$0")" "${options[@]}") <<'END' || exit 1
import logging, sys
logging.disable(logging.INFO)  # of fairseq; warnings about the options are to be seen
from fwp_fairseq.modules import FastWeightConfig
script, width, heads, rule, feature_map, key_normalization, nu, features, normalize, convolution = sys.argv[1:]
config = FastWeightConfig(
    update_rule=rule, feature_map=feature_map, key_normalization=key_normalization,
    dpfp_nu=int(nu), favor_features=int(features), attention_normalization=normalize == "1",
    short_convolution=int(convolution),
)
try:
    config.check(int(width), int(heads), "decoder")
except ValueError as error:
    sys.exit(f"{script}: {error}.".replace("--update-rule", "--rule"))
END
    mkdir -p steps
    printf '%s\n' "${options[*]}" >steps/attention
}

# --- The other language ----------------------------------------------------------------------------------------------

check_target_language() {
    [[ $target_language == [a-z][a-z] && $target_language != en ]] ||
        fail "--target-language is '$target_language', it must be the code of another language than en, such as de or fr."
}

# --- Several runs ----------------------------------------------------------------------------------------------------

# What compare.sh and convert.sh hand on to run.sh, and the seeds.
several_runs_options() {
    option cache text "" "folder for downloaded wheels (default: that of run.sh)"
    option wheels text "" "take the strings from the wheels in this folder, download none"
    option target-language text de "language to translate into: de or fr, or another of two letters that the wheels have"
    option vocab-size count 4000 "pieces of the sentencepiece vocabulary that both languages share"
    option valid-size count 500 "pairs for validation"
    option test-size count 500 "pairs for the score"
    option seeds "some number" "1 2 3" "seeds to train each with, between spaces"
}

# Go to the output folder, and set seed_list=(), and run=(), the command of run.sh with these options.
enter_several_runs() {
    check_target_language
    [[ -z $wheels || $wheels == /* ]] || wheels=$PWD/$wheels
    [[ -z $cache || $cache == /* ]] || cache=$PWD/$cache
    enter_output
    read -rd '' -ra seed_list <<<"$seeds" || true
    run=(bash "$recipe/run.sh" --output "$output" --python "$python" --venv "$venv"
        --target-language "$target_language" --vocab-size "$vocab_size" --valid-size "$valid_size" --test-size "$test_size")
    [[ -z $threads ]] || run+=(--threads "$threads")
    [[ -z $cache ]] || run+=(--cache "$cache")
    [[ -z $wheels ]] || run+=(--wheels "$wheels")
}

# --- Models ----------------------------------------------------------------------------------------------------------

# enter_model NAME SETTING...: from all that decides what is trained, set $settings, and the model's $folder, which is
# called $model, or else NAME with the seed and a digest. A model of that name with other settings is trained anew.
enter_model() {
    local name=$1 temporary=settings.$$
    shift
    settings=$(printf '%s\n' "$@")
    printf '%s\n' "$settings" >"$temporary"
    folder=models/${model:-$name-seed$seed-$(fingerprint "$temporary")}
    if [[ -d $folder && ! (-f $folder/settings && $(<"$folder/settings") == "$settings") ]]; then
        say "replacing $folder, which has other settings"
        rm -rf -- "$folder"
    fi
    mkdir -p -- "$folder"
    mv -- "$temporary" "$folder/settings"
}

# --- Training --------------------------------------------------------------------------------------------------------

# train FOLDER ARGUMENT...: fairseq-train into FOLDER/checkpoint_*.pt, going on from the last epoch that is there.
train() {
    local folder=$1
    shift
    log_training "$folder" fairseq train "$@" "${basics[@]}" --save-dir "$folder" --no-epoch-checkpoints --seed "$seed" \
        --max-epoch "$epochs" --num-workers 0 --log-format simple --log-interval 50
}
