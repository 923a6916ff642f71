#!/usr/bin/env bash
# Train with torchrun, on this node, or on several: then start the same line on each of them.
#
#   scripts/train_torchrun.sh [--dry-run] [--processes N] [--nodes N --head HOST:PORT] [--restarts N] [key=value ...]
#
# processes: on each node, by default one a GPU. head: where the nodes meet, any free port of one of them.
# restarts: how often all processes start again after one has failed, whatever the reason; by default never.
source "$(dirname "${BASH_SOURCE[0]}")/launch_common.sh"
gpus=$(nvidia-smi -L 2> /dev/null | grep -c '^GPU')
processes=$((gpus ? gpus : 1)) nodes=1 head= restarts=0
while [ $# -gt 0 ]; do
    case $1 in
        --processes) whole 1 "$@" && processes=$2 && shift ;;
        --nodes) whole 1 "$@" && nodes=$2 && shift ;;
        --head) given "$@" && head=$2 && shift ;;
        --restarts) whole 0 "$@" && restarts=$2 && shift ;;
        *) option "$1" || break ;;
    esac
    shift
done
[ "$nodes" = 1 ] || [[ $head =~ .:[0-9]+$ ]] ||
    refuse "--nodes $nodes needs --head HOST:PORT, where they meet, not '$head'"

check $((nodes * processes)) "$@"
meet=(--standalone)
[ "$nodes" = 1 ] || meet=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-endpoint "$head" --rdzv-id "$(basename "$run_dir")")
# Restarted processes meet in a fresh store: in the one that torchrun keeps they find the addresses of the dead.
[ "$restarts" = 0 ] || export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
run "$python" -m torch.distributed.run --max-restarts "$restarts" "${meet[@]}" --nproc-per-node "$processes" \
    -m nsa_train train "$@"
