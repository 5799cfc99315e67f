# Sourced by the batch scripts: runs a step of the job, and requeues the job before its time ends.
#
# Slurm sends USR1 to the batch shell so many seconds before the end (`#SBATCH --signal=B:USR1@300`). The step
# then gets TERM: taxolens finishes the training step, writes a checkpoint and ends. The job is queued
# again, and `--resume_from_checkpoint auto` goes on from the newest complete checkpoint.
# After a preemption Slurm requeues by itself (`#SBATCH --requeue`).

PYTHON=${PYTHON:-python}

run_step() {
    srun "$@" &
    local step=$! status=0
    trap 'requeue=1; kill -TERM "$step"' USR1
    wait "$step" || status=$?
    if [[ -n "${requeue:-}" ]]; then
        wait "$step" || true # the trap ended the first wait
        scontrol requeue "$SLURM_JOB_ID"
        exit 0
    fi
    return "$status"
}
