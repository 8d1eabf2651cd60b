#!/usr/bin/env bash
# Speed of fast weights on this machine's processor, beside other implementations. See README.md.
#
#   bash recipes/benchmark/run.sh [--output DIR] [--only operators|models] [--venv DIR|none] [-- OPTION...]
#
# Makes an environment (environment.sh), unless there is one, or --venv none says to use the active one. What follows --
# goes to operators.py or models.py, with --only. Tables go to the terminal and, with CSV files and the plot, to DIR.
# Takes half an hour.

parts=(operators models)
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
