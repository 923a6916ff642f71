#!/usr/bin/env bash
# Train with DeepSpeed's launcher, which reaches the nodes of a hostfile by ssh (lines like `worker-1 slots=8`).
#
#   scripts/train_deepspeed.sh [--dry-run] --hostfile FILE [--port N] [key=value ...]
#
# port: of the first node, where the others meet it. Nodes need the same paths; variables beyond PYTHON* and NCCL*
# travel by a file ~/.deepspeed_env.
source "$(dirname "${BASH_SOURCE[0]}")/launch_common.sh"
hostfile='' port=29500
while [ $# -gt 0 ]; do
    case $1 in
        --hostfile) given "$@" && hostfile=$2 && shift ;;
        --port) whole 1 "$@" && port=$2 && shift ;;
        *) option "$1" || break ;;
    esac
    shift
done
read -r nodes processes < <(awk -F 'slots=' '!/^ *#/ && NF > 1 { m++; n += $2 } END { print m + 0, n + 0 }' \
    "${hostfile:-/dev/null}" 2> /dev/null)
[ "${processes:-0}" != 0 ] ||
    refuse "--hostfile '$hostfile' names no node; it needs a line like 'worker-1 slots=8' for each"

check "$processes" "$@"
options=(--hostfile "$hostfile" --master_port "$port")
options+=(--no_local_rank) # else every process gets the argument --local_rank=N, which is no key=value
[ "$nodes" != 1 ] || options+=(--master_addr 127.0.0.1 --no_ssh_check) # one node is this one: no ssh to it
run "$python" -m deepspeed.launcher.runner "${options[@]}" --module nsa_train train "$@"
