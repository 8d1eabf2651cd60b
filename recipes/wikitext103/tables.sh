#!/usr/bin/env bash
# Usage: bash tables.sh [OPTION]...
#
# Print tables 2 to 5, the paper's figures beside those of the models that evaluate.sh has evaluated, and write them to
# OUTPUT/tables.md and OUTPUT/tables.csv.

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

common_options
parse_options "$@"
enter_trained
enter_environment
"$python" "$recipe/tables.py" tables .
