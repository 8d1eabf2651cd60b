#!/usr/bin/env bash
# Perplexity of trained models on the validation and test parts. See README.md, or --help.

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<END
Usage: bash evaluate.sh [MODEL]... [OPTION]...

Evaluate the models of these names, or all that train.sh has finished: with a window that slides by one token, or, for
rows of table 4, in one pass that carries the context from segment to segment. What is done already is not done again.
END
}

common_options
option window text "" "tokens of the window, or of what is read at once (default: the row's segment)"
option batch-size count 64 "windows to compute at once"
option precision "fp32 fp16" fp32 "number format on a GPU"
option cpu flag 0 "evaluate on the processor"
parse_options "$@"
[[ -z $window ]] || check_option window count
enter_trained
enter_environment
options=()
((!cpu)) || options+=(--cpu)
[[ $precision == fp32 ]] || options+=(--fp16)
evaluate_models
