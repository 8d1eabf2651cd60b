#!/usr/bin/env bash
# Usage: bash evaluate.sh [MODEL]... [OPTION]...
#
# Evaluate the models of these names, or all that train.sh has finished: with a window that slides by one token, or, for
# rows of table 4, in one pass that carries the context from segment to segment. What is done already is not done again.
#
# Takes minutes on a GPU and hours on a processor for each model, by estimate: its window is read once for each word of the
# text. Rows of table 4 read the text once.

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

common_options
option window count "" "tokens of the window, or of what is read at once (default: the row's segment)"
option batch-size count 64 "windows to compute at once"
option precision "fp32 fp16" fp32 "number format on a GPU"
option cpu flag 0 "evaluate on the processor"
parse_options_and_words "$@"
enter_trained
enter_environment
options=()
((!cpu)) || options+=(--cpu)
[[ $precision == fp32 ]] || options+=(--fp16)
evaluate_models
