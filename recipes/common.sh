# shellcheck shell=bash
# What the recipes for fairseq share: options, the virtual environment, steps that are done once, running fairseq.
# To be sourced by a recipe's common.sh, which first sets `recipe` to its own folder, with bash.

set -euo pipefail

repository=$(cd "$recipe/../.." && pwd)
recipe_name=$(basename "$recipe")
# Otherwise glibc gives every large tensor back to the system and takes it again, page by page.
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296
# Numbers and patterns mean the same everywhere; Python reads and writes UTF-8 all the same.
export LC_ALL=C PYTHONUTF8=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# No other script that runs has this name.
unique=$HOSTNAME.$$

say() { printf '== %s\n' "$*"; }

fail() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}

# --- Options ---------------------------------------------------------------------------------------------------------
# Each is a flag --some-name, an environment variable FWP_SOME_NAME (the flag wins) and, here, a shell variable
# some_name. Kinds: flag (0 or 1), count (whole number, at least 1), number (whole number), text, the allowed words, or
# `some KIND`: several of a kind between spaces. What is empty by default may stay so.

option_names=()
option_kinds=()
option_helps=()

# option NAME KIND DEFAULT HELP: declare an option and take its value from the environment, or the default.
option() {
    local name=${1//-/_} kind=$2 environment
    environment=FWP_$(printf %s "$name" | tr '[:lower:]' '[:upper:]')
    [[ -n $3 ]] || kind="optional $kind"
    option_names+=("$1")
    option_kinds+=("$kind")
    case $2:$3 in
    flag:* | *:) option_helps+=("$4") ;;
    *) option_helps+=("$4 (default: $3)") ;;
    esac
    printf -v "$name" %s "${!environment-$3}"
}

# What --help prints before the options: the comment at the beginning of the script, unless that has another usage().
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }

print_options() {
    local i kind
    printf '\nOptions; each can be given as an environment variable too (FWP_EPOCHS for --epochs):\n'
    for i in "${!option_names[@]}"; do
        kind=${option_kinds[i]#optional }
        case $kind in
        flag) kind= ;;
        count | number) kind=' N' ;;
        text | some\ *) kind=' TEXT' ;;
        *) kind=" {${kind// /,}}" ;;
        esac
        printf '  --%s%s\n      %s\n' "${option_names[i]}" "$kind" "${option_helps[i]}"
    done
}

# check_option NAME KIND VALUE
check_option() {
    local name=$1 kind=$2 value=$3 word several
    case $kind in
    optional\ *) [[ -z $value ]] || check_option "$name" "${kind#* }" "$value" ;;
    some\ *)
        read -rd '' -ra several <<<"$value" || true
        ((${#several[@]})) || fail "--$name is empty."
        for word in "${several[@]}"; do
            check_option "$name" "${kind#* }" "$word"
        done
        ;;
    flag) [[ $value == [01] ]] || fail "--$name is a switch; its environment variable is 0 or 1, not '$value'." ;;
    count) [[ $value =~ ^[1-9][0-9]{0,8}$ ]] || fail "--$name is '$value', it must be a whole number of at least 1." ;;
    number) [[ $value =~ ^[0-9]{1,9}$ ]] || fail "--$name is '$value', it must be a whole number." ;;
    text) ;;
    *)
        for word in $kind; do
            [[ $value != "$word" ]] || return 0
        done
        fail "--$name is '$value', allowed are: ${kind// /, }."
        ;;
    esac
}

# parse_options ARGUMENT...: set the declared options, and extra=() to the arguments after --; others are refused.
parse_options() {
    parse_options_and_words "$@"
    ((!${#words[@]})) || fail "unexpected argument '${words[0]}' (--help lists the options)."
}

# parse_options_and_words ARGUMENT...: the same, with the other arguments in words=().
parse_options_and_words() {
    local argument name value i
    words=()
    extra=()
    while (($#)); do
        argument=$1
        shift
        case $argument in
        -h | --help)
            usage
            print_options
            exit 0
            ;;
        --)
            extra=("$@")
            break
            ;;
        --*)
            name=${argument#--}
            name=${name%%=*}
            for i in "${!option_names[@]}" none; do
                [[ $i == none || ${option_names[i]} != "$name" ]] || break
            done
            [[ $i != none ]] || fail "unknown option --$name (--help lists the options)."
            if [[ ${option_kinds[i]} == flag ]]; then
                [[ $argument != *=* ]] || fail "--$name takes no value."
                value=1
            elif [[ $argument == *=* ]]; then
                value=${argument#*=}
            else
                (($#)) || fail "--$name needs a value."
                value=$1
                shift
            fi
            printf -v "${name//-/_}" %s "$value"
            ;;
        -?*) fail "unknown option $argument (--help lists the options)." ;;
        *) words+=("$argument") ;;
        esac
    done
    for i in "${!option_names[@]}"; do
        name=${option_names[i]//-/_}
        check_option "${option_names[i]}" "${option_kinds[i]}" "${!name}"
    done
}

# Options of every script, and what they mean.
common_options() {
    option output text "$repository/outputs/$recipe_name" "folder for everything that is made"
    option python text "${PYTHON:-$(command -v python3.11 || echo python3)}" \
        "Python 3.10 to 3.12 to make the virtual environment with; the environment variable PYTHON sets it too"
    option venv text "" "folder of the virtual environment (default: OUTPUT/venv), or 'none': use --python as it is"
    option threads count "" "processor threads to use (default: all cores)"
}

# Check the common options and move to the output folder, where all later paths start.
enter_folder() {
    [[ -n $output ]] || fail "--output is empty."
    # fairseq reads a colon as the separator of several data folders.
    [[ $output != *:* ]] || fail "--output $output has a colon in it, which fairseq cannot handle."
    mkdir -p -- "$output" || fail "--output $output cannot be made."
    output=$(cd -- "$output" && pwd)
    command -v -- "$python" >/dev/null || fail "--python $python is not to be found."
    [[ $python != */* || $python == /* ]] || python=$PWD/$python
    [[ $venv == none || $venv == /* ]] || venv=${venv:+$PWD/$venv}
    venv=${venv:-$output/venv}
    cd -- "$output"
    if [[ -n $threads ]]; then
        export OMP_NUM_THREADS=$threads MKL_NUM_THREADS=$threads
    fi
}

# The same for a recipe that replaces files and removes folders: not among files of somebody else.
enter_output() {
    local marker=.${recipe_name//_/-}
    enter_folder
    [[ ! -e $marker ]] || return 0
    [[ -z $(ls -A) ]] || fail "--output $output holds files of something else: name a new folder."
    touch -- "$marker"
}

# --- Steps -----------------------------------------------------------------------------------------------------------

# step MARKER ARTEFACT SETTINGS TITLE COMMAND...: run the command, unless it was done with these settings (the marker
# file says so) and the artefact, a file or a folder, is still what it made. The marker is written last: an interrupted
# step is done again.
step() {
    local marker=$1 artefact=$2 settings=$3 title=$4
    shift 4
    if [[ -e $artefact && -f $marker && $(<"$marker") == "$settings"$'\n'"$(state_of "$artefact")" ]]; then
        say "$title: done before"
        return
    fi
    say "$title"
    mkdir -p -- "$(dirname -- "$marker")"
    rm -f -- "$marker"
    "$@"
    # By a name of its own: several machines on one disk may do this at the same time.
    printf '%s\n' "$settings" "$(state_of "$artefact")" >"$marker.$unique"
    mv -- "$marker.$unique" "$marker"
}

# state_of FILE|FOLDER: a short text that changes when a file is cut short or damaged; of large files only the size
# counts, so that it takes no time.
state_of() {
    "$python" - "$1" <<'END'
import sys, zlib
from pathlib import Path
named = Path(sys.argv[1])
state = []
for path in sorted(named.rglob("*")) if named.is_dir() else [named]:
    if path.is_file():
        size = path.stat().st_size
        state.append((str(path.relative_to(named)), size, zlib.crc32(path.read_bytes()) if size < 2**26 else None))
print(f"{zlib.crc32(repr(state).encode()):08x}")
END
}

# fingerprint FILE...: a short digest of the contents, in the order given.
fingerprint() {
    local file
    for file; do sha256sum <"$file" || exit; done | cut -c -64 | tr -d '\n' | sha256sum | cut -c -16
}

# --- Environment -----------------------------------------------------------------------------------------------------

install() {
    "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' ||
        fail "--python $python is $("$python" --version 2>&1), needed is Python 3.10 to 3.12."
    "$python" -m venv --clear -- "$venv"
    touch -- "$venv/.ours"
    local requirements=()
    [[ ! -f $recipe/requirements.txt ]] || requirements=(-r "recipes/$recipe_name/requirements.txt")
    # From inside the clone: pip takes a path with an extra only if nothing in the path is special to it.
    # Twice, because the compiled operators need torch to be there when they are built; without a C++ compiler the
    # package works, only slower.
    (cd -- "$repository" &&
        "$venv/bin/python" -m pip install -c constraints.txt ${requirements[@]+"${requirements[@]}"} \
            -e ".[fairseq]" setuptools &&
        "$venv/bin/python" -m pip install -c constraints.txt --no-deps --no-build-isolation -e .)
}

# Make sure that $python has everything installed; set what fairseq's commands need.
enter_environment() {
    if [[ $venv != none ]]; then
        [[ ! -e $venv/pyvenv.cfg || -e $venv/.ours || -e $venv/.installed ]] ||
            fail "--venv $venv was made by something else: name a new folder, or 'none' with --python $venv/bin/python."
        local files=("$repository"/{setup.py,pyproject.toml,constraints.txt,fwp_fairseq/csrc/*})
        [[ ! -f $recipe/requirements.txt ]] || files+=("$recipe/requirements.txt")
        step "$venv/.installed" "$venv/bin/python" "$("$python" --version 2>&1) $(fingerprint "${files[@]}")" \
            "virtual environment and packages" install
        python=$venv/bin/python
    fi
    # The plugin of this clone, even if $python has another one.
    export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH}
    user_dir=$repository/fwp_fairseq
    # For every fairseq command that runs a model. With its default multiple of 8 fairseq would leave out what does not
    # fill the last batch, of the test too. Whether there is a GPU it sees by itself.
    basics=(--user-dir "$user_dir" --required-batch-size-multiple 1)
}

# fairseq TOOL ARGUMENT...: fairseq-TOOL, not through its script: a script's first line cannot name every path.
fairseq() {
    local tool=$1
    shift
    # The warnings are about fairseq's own use of torch; its messages to the user are not among them.
    PYTHONWARNINGS=ignore "$python" -m "fairseq_cli.$tool" "$@"
}

# quietly LOG COMMAND...: run a command with its messages in a file, whose end is shown if it fails.
quietly() {
    local log=$1
    shift
    if ! "$@" 2>"$log"; then
        tail -n 5 -- "$log" >&2
        fail "fairseq-${2//_/-} failed (all of its messages: $log)."
    fi
}

# preprocess FOLDER ARGUMENT...: fairseq-preprocess into a folder, which is there whole or not at all.
preprocess() {
    local folder=$1
    shift
    rm -rf -- "$folder" "$folder.new"
    mkdir -p -- "$(dirname -- "$folder")"
    quietly preprocess.log fairseq preprocess "$@" --destdir "$folder.new" >/dev/null
    mv -- "$folder.new" "$folder"
}

# --- Training --------------------------------------------------------------------------------------------------------

check_model_name() {
    [[ $model =~ ^[A-Za-z0-9._-]*$ && $model != .* ]] ||
        fail "--model is '$model', allowed are letters, digits, . _ and - (not first)."
}

# Print the progress and the warnings among fairseq's messages as they come. (Some kinds of awk wait until there is more.)
show_progress() {
    local line
    while IFS= read -r line || [[ -n $line ]]; do
        case $line in
        *'| train |'* | *'| valid |'* | *'| train_inner |'*) printf '%s\n' "${line##*INFO | }" ;;
        *WARNING*) printf '%s\n' "$line" ;;
        esac
    done
}

# log_training FOLDER COMMAND...: run a training into FOLDER/checkpoint_*.pt; the user sees its progress and warnings, all of
# its messages are in FOLDER/train.log.
log_training() {
    local folder=$1
    shift
    mkdir -p -- "$folder"
    "$@" 2>&1 | tee -a -- "$folder/train.log" | show_progress || {
        # Of several processes the last lines say only that one has failed.
        grep -aE '^(\[rank[0-9]+\]: )?[A-Za-z.]*(Error|Exception)\b' "$folder/train.log" | grep -v ChildFailedError |
            tail -n 1 >&2 || tail -n 5 -- "$folder/train.log" >&2
        fail "fairseq-train failed (all of its messages: $output/$folder/train.log)."
    }
}
