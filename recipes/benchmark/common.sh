# shellcheck shell=bash
# What run.sh and decode.sh share; `parts` has the names of the Python files that they run. To be sourced by them.

recipe=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$recipe/../common.sh"

common_options
option only "${parts[*]}" "" "one of its parts"
parse_options "$@"
((!${#extra[@]})) || [[ -n $only ]] || fail "options after -- are for one part: name it with --only."
enter_folder
enter_environment

# The implementations that it is compared with; one that cannot be installed is left out, and said so.
install_peers() {
    local pip=("$python" -m pip install --quiet -c constraints.txt)
    cd -- "$repository"
    # Without nvcc on PATH: the kernels compared here are those for the processor.
    PATH=$venv/bin:/usr/bin:/bin "${pip[@]}" --no-build-isolation pytorch-fast-transformers==0.4.0 ||
        say "left out: pytorch-fast-transformers 0.4.0"
    "${pip[@]}" --no-deps flash-linear-attention==0.6.0 fla-core==0.6.0 einops ||
        say "left out: flash-linear-attention 0.6.0"
    "${pip[@]}" ctranslate2==4.8.5 || say "left out: CTranslate2 4.8.5"
    cd -- "$output"
}
if [[ $venv != none ]]; then
    step "$venv/.peers" "$venv/.installed" "$(fingerprint "$recipe/common.sh")" "implementations to compare with" install_peers
fi

for part in ${only:-"${parts[@]}"}; do
    say "$part"
    "$python" "$recipe/$part.py" --output . ${extra[@]+"${extra[@]}"} | tee "$part.txt.new"
    mv "$part.txt.new" "$part.txt"
done
