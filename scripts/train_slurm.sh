#!/usr/bin/env bash
#SBATCH --job-name=nsa_train
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
# Train under Slurm, one task a GPU; from the checkout's root: sbatch [--nodes=4 ...] scripts/train_slurm.sh [key=value ...]
# See what would start, anywhere: scripts/train_slurm.sh --dry-run [key=value ...]
#
# Five minutes before its time ends, or when it is preempted, the run writes a checkpoint and ends with 75. Then, and
# after a hang (19), the job puts itself into the queue again and goes on; any other end is final, and so is the third
# launch in a row that has left no new checkpoint.
source "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}/scripts/launch_common.sh" || {
    echo "error: start it with sbatch from the checkout's root, not from ${SLURM_SUBMIT_DIR:-here}" >&2
    exit 2
}
while [ $# -gt 0 ] && option "$1"; do shift; done

processes=${SLURM_NTASKS:-8}
whole 1 SLURM_NTASKS "$processes"
check "$processes" "$@"
[ -n "$dry_run${SLURM_JOB_NODELIST:-}" ] || refuse "this is no Slurm job; start it with sbatch, --help shows how"
# Expanded by each task.
# shellcheck disable=SC2016
as_rank='export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; exec "$@"'
command=(srun --kill-on-bad-exit=1 --output="$run_dir/logs/%N.log" --open-mode=append
    bash -c "$as_rank" rank "$python" -m nsa_train train "$@")
announce "$run_dir/logs/<node>.log" "${command[@]}"

# newest: the name of the newest complete checkpoint, nothing without one.
newest() {
    find "$run_dir/checkpoints/" -maxdepth 1 2> /dev/null | grep -oE 'step_[0-9]+$' | sort -V | tail -n 1
}
idle=$run_dir/logs/idle # holds how many launches of this job in a row have left no new one
[ "${SLURM_RESTART_COUNT:-0}" != 0 ] || echo 0 > "$idle"
before=$(newest)

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-8} # since Slurm 22.05 srun does not take it from the job
trap : TERM USR1 # they are meant for the tasks; this script stays to decide
"${command[@]}"
tasks=$?
# Tasks that srun stops because another one failed say 75, too. An interruption is what this launch's summary.json calls
# so, else a job whose start fails would requeue itself for ever.
code=$(real_code $((tasks == 75 ? 1 : tasks)))
# A task that is killed at each start looks like a preemption, since srun stops the others; only that it leads nowhere
# tells them apart.
launches=0
[ "$(newest)" != "$before" ] || launches=$(($(cat "$idle") + 1))
echo "$launches" > "$idle"
case $code in
    75 | 19)
        if [ "$launches" -lt 3 ]; then
            scontrol requeue "$SLURM_JOB_ID"
        else
            echo "error: not requeued: $launches launches in a row ended without a new checkpoint in" \
                "$run_dir/checkpoints; see $run_dir/logs, then submit the job again" >&2
        fi
        ;;
esac
exit "$code"
