#!/usr/bin/env bash
# Train under Slurm: one torchrun for each node, eight GPUs each. Run it from the repository's folder:
#   sbatch --nodes=2 runs/slurm.sh config/dense_7b.toml --data1=... --image_dir=...
#   sbatch --nodes=8 runs/slurm.sh config/dense_7b.toml ...
#   sbatch --nodes=2 --requeue runs/slurm.sh config/dense_7b.toml --out=out/dense_7b --resume
# All nodes must see the folder --out. To plan the run: python -m tools.plan config/dense_7b.toml --gpus=16
#SBATCH --job-name=nanomllm
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --output=slurm-%j.log
set -euo pipefail
# every batch has another length, which would fragment the memory
export PYTORCH_ALLOC_CONF=expandable_segments:True

gpus=${GPUS_PER_NODE:-8}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# two jobs on one node need different ports
port=$((20000 + SLURM_JOB_ID % 20000))

if [ -z "${ELASTIC:-}" ]; then
    # Static: exactly these nodes. Slurm sends SIGTERM two minutes before the time limit. The run then finishes its step and
    # saves, if both take less than the 30 seconds that torchrun waits. Otherwise the last --save_every checkpoint counts.
    srun --kill-on-bad-exit=1 torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="$gpus" \
        --rdzv-backend=c10d --rdzv-endpoint="$first:$port" --rdzv-id="$SLURM_JOB_ID" train.py "$@"
else
    # Elastic (ELASTIC=1): any number of nodes from one to all. If a worker is lost, the rest restart from the last
    # checkpoint, at most three times. The arguments must name --out.
    # torch 2.13 would give a restart the addresses of the lost ranks
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    srun --kill-on-bad-exit=0 torchrun --nnodes="1:$SLURM_NNODES" --nproc_per_node="$gpus" --max-restarts=3 \
        --rdzv-backend=c10d --rdzv-endpoint="$first:$port" --rdzv-id="$SLURM_JOB_ID" train.py "$@" --resume
fi
