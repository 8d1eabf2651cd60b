#!/usr/bin/env bash
# Speed and memory of decoding on this machine's processor, with fast weights and with softmax. See README.md.
#
#   bash recipes/benchmark/decode.sh [--output DIR] [--only step|decode] [--venv DIR|none] [-- OPTION...]
#
# Makes an environment (environment.sh), unless there is one, or --venv none says to use the active one. What follows --
# goes to step.py or decode.py, with --only. Tables go to the terminal and, with CSV files and the plot, to DIR. Runs of
# fairseq-generate that are in decode.csv are not done again. Takes more than an hour.

parts=(step decode)
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
