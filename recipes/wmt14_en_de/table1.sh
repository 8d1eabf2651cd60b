#!/usr/bin/env bash
# Usage: bash table1.sh [OPTION]...
#
# Print table 1, the paper's figures beside those of the models that evaluate.sh has scored, and write it to
# OUTPUT/table1.md and OUTPUT/table1.csv.

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

common_options
parse_options "$@"
enter_prepared
enter_environment
"$python" "$recipe/table1.py" .
