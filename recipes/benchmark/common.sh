# What run.sh and decode.sh share; `parts` has the names of the Python files that they run.

set -euo pipefail
script=$(basename "$0")
recipe=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
output=$recipe/../../outputs/benchmark
only= venv=

fail() {
    echo "$script: $*" >&2
    exit 1
}

while (($#)); do
    case $1 in
    --output | --only | --venv)
        (($# > 1)) || fail "$1 needs a value."
        printf -v "${1#--}" %s "$2"
        shift
        ;;
    --)
        shift
        break
        ;;
    -h | --help)
        sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
        exit
        ;;
    *) fail "unknown argument '$1' (allowed are --output, --only, --venv, --)." ;;
    esac
    shift
done
[[ -z $only || " ${parts[*]} " == *" $only "* ]] || fail "--only is '$only', allowed are ${parts[0]} and ${parts[1]}."
(($# == 0)) || [[ -n $only ]] || fail "options after -- are for one part: name it with --only."
mkdir -p "$output"
output=$(cd "$output" && pwd)

# Otherwise glibc gives every large tensor back to the system and takes it again page by page: noise for everyone.
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296

python=python
if [[ $venv != none ]]; then
    venv=${venv:-$output/venv}
    bash "$recipe/environment.sh" "$venv"
    python=$venv/bin/python
fi

for part in ${only:-"${parts[@]}"}; do
    echo "== $part"
    "$python" "$recipe/$part.py" --output "$output" "$@" | tee "$output/$part.txt.new"
    mv "$output/$part.txt.new" "$output/$part.txt"
done
