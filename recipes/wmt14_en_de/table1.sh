#!/usr/bin/env bash
# Collect what evaluate.sh has found into the paper's table 1. See README.md, or --help.

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<END
Usage: bash table1.sh [OPTION]...

Print table 1, the paper's figures beside those of the models that evaluate.sh has scored, and write it to
OUTPUT/table1.md and OUTPUT/table1.csv.
END
}

common_options
parse_options "$@"
no_words
enter_prepared
enter_environment
"$python" "$recipe/table1.py" .
