#!/usr/bin/env bash
# Collect what evaluate.sh has found into the paper's tables 2 to 5. See README.md, or --help.

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<END
Usage: bash tables.sh [OPTION]...

Print tables 2 to 5, the paper's figures beside those of the models that evaluate.sh has evaluated, and write them to
OUTPUT/tables.md and OUTPUT/tables.csv.
END
}

common_options
parse_options "$@"
no_words
enter_trained
enter_environment
"$python" "$recipe/tables.py" tables .
