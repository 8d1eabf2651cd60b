#!/usr/bin/env bash
# Usage: bash decode.sh [OPTION]... [-- OPTION_OF_A_PART...]
#
# Speed and memory of decoding on this machine's processor, with fast weights and with softmax. Tables go to the terminal
# and, with CSV files and the plot, to OUTPUT. Runs of fairseq-generate that are in decode.csv are not done again. What
# follows -- goes to step.py or decode.py, with --only.
#
# Takes more than an hour, and needs a C++ compiler.

parts=(step decode)
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
