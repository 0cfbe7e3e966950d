#!/usr/bin/env bash
# One run on several machines under SLURM: sbatch slurm.sh [settings of drift fit]
# torchrun starts one process for each GPU; where one dies, all start again, from the last checkpoint.
#SBATCH --job-name=drift
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=%x_%j.log
set -euo pipefail

host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" \
    --nproc-per-node="$SLURM_GPUS_ON_NODE" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$host:29500" \
    --rdzv-id="$SLURM_JOB_ID" \
    --max-restarts=3 \
    -m drift fit \
    --config llada_math \
    --config strategy/fsdp \
    --trainer.num_nodes "$SLURM_JOB_NUM_NODES" \
    --data.prompts_per_step 64 \
    --model.train_groups 32 \
    --resume auto \
    "$@"
