#!/usr/bin/env bash
# Usage: bash run.sh [OPTION]... [-- OPTION_OF_A_PART...]
#
# Speed of fast weights on this machine's processor, beside other implementations: of operators, and of the training of
# language models. Tables go to the terminal and, with CSV files and the plot, to OUTPUT. What follows -- goes to
# operators.py or models.py, with --only.
#
# Takes half an hour, and needs a C++ compiler.

parts=(operators models)
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
