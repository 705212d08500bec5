#!/usr/bin/env bash
# A training run under Slurm, one torchrun a node, eight GPUs each. From the project's folder:
#   sbatch --nodes=2 runs/slurm.sh config/dense_7b.toml --data1=... --image_dir=...
#   sbatch --nodes=8 runs/slurm.sh config/dense_7b.toml --fsdp ...       what is larger than one card (or a node's worth of DDP)
#   sbatch --nodes=2 --requeue runs/slurm.sh config/dense_7b.toml --out=out/dense_7b --resume      goes on where it was
# --out must be a folder that all nodes see. What the run will take: python train.py config/dense_7b.toml --plan --gpus=16
#SBATCH --job-name=mllm
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --output=slurm-%j.log
set -euo pipefail

gpus=${GPUS_PER_NODE:-8}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))                               # two jobs that share a node do not meet

if [ -z "${ELASTIC:-}" ]; then
    # static: exactly these nodes. Two minutes before the time is over Slurm sends SIGTERM: the run finishes its step and saves, if
    # both take less than the 30 seconds that torchrun leaves its workers; else the last of --save_every counts
    srun --kill-on-bad-exit=1 torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="$gpus" \
        --rdzv-backend=c10d --rdzv-endpoint="$first:$port" --rdzv-id="$SLURM_JOB_ID" train.py "$@"
else
    # elastic, ELASTIC=1: on any number of nodes from one to all. After a lost worker those that are left start anew, up to three
    # times, and --resume takes them to the last checkpoint; it starts a run that has none. The arguments must name --out
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1               # or torch 2.13 hands a restart the addresses of the former ranks
    srun --kill-on-bad-exit=0 torchrun --nnodes="1:$SLURM_NNODES" --nproc_per_node="$gpus" --max-restarts=3 \
        --rdzv-backend=c10d --rdzv-endpoint="$first:$port" --rdzv-id="$SLURM_JOB_ID" train.py "$@" --resume
fi
