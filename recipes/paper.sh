# shellcheck shell=bash
# What the recipes for the paper's tables share beyond common.sh: public archives, GPUs on one machine or several, and
# trainings that took too long to be replaced by mistake. To be sourced after common.sh.

# --- Arguments -------------------------------------------------------------------------------------------------------

# Set row to the one that was given, of the array rows.
enter_row() {
    ((${#words[@]} == 1)) || fail "name one row, of: ${rows[*]} (--help lists the options)."
    row=${words[0]}
    [[ " ${rows[*]} " == *" $row "* ]] || fail "there is no row '$row', allowed are: ${rows[*]}."
}

# --- Archives --------------------------------------------------------------------------------------------------------

archive_options() {
    option from text "" "a base address that has the archives, or a folder of them (default: their public addresses)"
    option checksums text "" "file of checksums, as sha256sum or md5sum write them, that the archives must have"
    option jobs count "$(nproc)" "processes to work on the text with"
}

# Make the paths of the archive options absolute, and check them.
check_archive_options() {
    if [[ -n $from && $from != *://* ]]; then
        [[ -d $from ]] || fail "--from $from is neither an address nor a folder."
        from=$(cd -- "$from" && pwd)
    fi
    if [[ -n $checksums ]]; then
        [[ -f $checksums ]] || fail "--checksums $checksums is not a file."
        checksums=$(cd -- "$(dirname -- "$checksums")" && pwd)/$(basename -- "$checksums")
    fi
}

# get_archives URL...: into archives/, with their checksums in archives/SHA256SUMS.
get_archives() {
    local options=(--output archives)
    [[ -z $from ]] || options+=(--from "$from")
    [[ -z $checksums ]] || options+=(--checksums "$checksums")
    "$python" "$repository/recipes/archives.py" get "${options[@]}" "$@"
}

# --- GPUs ------------------------------------------------------------------------------------------------------------

cluster_options() {
    option gpus count "" "GPUs to use on each machine (default: all that are visible); with --cpu: processes"
    option nodes count 1 "machines; the same command, but for --node-rank, is to be started on each"
    option node-rank number 0 "number of this machine, from 0"
    option master text "" "address of machine 0, for several machines"
    option port count 29500 "port on machine 0"
    option cpu flag 0 "train on the processor: for a miniature"
    option precision "fp32 fp16" "$1" "number format on a GPU; on the processor it is fp32"
}

check_cluster_options() {
    ((node_rank < nodes)) || fail "--node-rank is $node_rank, it must be less than --nodes, which is $nodes."
    ((nodes == 1)) || [[ -n $master ]] || fail "--nodes $nodes needs --master, the address of machine 0."
    ((port < 65536)) || fail "--port is $port, it must be less than 65536."
}

# Set the number of $processes on all machines.
count_processes() {
    if [[ -z $gpus ]]; then
        gpus=1
        if ((!cpu)); then
            gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
            ((gpus)) || fail "no GPU is visible: --cpu trains on the processor, for a miniature."
        fi
    fi
    processes=$((gpus * nodes))
}

# distributed ARGUMENT...: fairseq-train in $processes processes, $gpus of them on this machine.
distributed() {
    local options=(--distributed-world-size "$processes") command=("$python")
    # fairseq would set up the communication by itself for GPUs only, and take all of them.
    ((processes == 1)) || options+=(--distributed-init-method env:// --distributed-rank=-1 --distributed-no-spawn)
    if ((cpu)); then
        options+=(--cpu)
        ((processes == 1)) || options+=(--distributed-backend gloo --ddp-backend legacy_ddp)
    elif [[ $precision != fp32 ]]; then
        options+=("--$precision")
    fi
    if ((processes > 1)); then
        command+=(-m torch.distributed.run --nproc_per_node "$gpus" --nnodes "$nodes" --node_rank "$node_rank"
            --master_addr "${master:-127.0.0.1}" --master_port "$port")
    fi
    PYTHONWARNINGS=ignore "${command[@]}" -m fairseq_cli.train "$@" "${options[@]}"
}

# --- Models ----------------------------------------------------------------------------------------------------------

# keep_model NAME SETTING...: set $folder to models/NAME, which is new or was made with these settings.
keep_model() {
    local name=$1
    shift
    folder=models/$name
    settings=$(printf '%s\n' "$@")
    if [[ -f $folder/settings && $(<"$folder/settings") != "$settings" ]]; then
        fail "$output/$folder was trained with other settings: give this one another name with --model."
    fi
    mkdir -p -- "$folder"
    printf '%s\n' "$settings" >"$folder/settings.$unique"
    mv -- "$folder/settings.$unique" "$folder/settings"
}

# Set chosen=() to the folders of the models that were named, or of all that are trained.
choose_models() {
    local model folder
    chosen=()
    for model in ${words[@]+"${words[@]}"}; do
        check_model_name
        folder=models/$model
        [[ -f $folder/checkpoint_best.pt ]] || fail "there is no trained model $output/$folder: train it with train.sh."
        chosen+=("$folder")
    done
    ((!${#words[@]})) || return 0
    for folder in models/*/; do
        [[ ! -f ${folder}.trained ]] || chosen+=("${folder%/}")
    done
    ((${#chosen[@]})) || fail "there is no trained model in $output: train one with train.sh first."
}
