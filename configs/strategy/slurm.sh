#!/usr/bin/env bash
# One run on several machines under SLURM: sbatch slurm.sh [settings of drift fit]
# srun starts one process for each GPU. Ten minutes before the time is up SLURM sends them SIGUSR1: they save, put the
# job back into the queue and stop; the next start goes on from there. Where a process dies, all start again here.
#SBATCH --job-name=drift
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x_%j.log
set -uo pipefail

for start in 1 2 3 4; do
    srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" drift fit \
        --config llada_math \
        --config strategy/fsdp \
        --trainer.devices "$SLURM_NTASKS_PER_NODE" \
        --trainer.num_nodes "$SLURM_JOB_NUM_NODES" \
        --data.prompts_per_step 64 \
        --model.train_groups 32 \
        --resume auto \
        "$@"
    status=$?
    case $status in
        0 | 130 | 138 | 143) break ;; # done, or told to stop
    esac
    echo "start $start ended with status $status"
done
exit "$status"
