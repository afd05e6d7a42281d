#!/usr/bin/env bash
# One training job on a Slurm cluster: sbatch --nodes=2 dev/slurm.sh -m scripts.base_train --depth 24
#
# NANOCHAT_BASE_DIR must lie on a shared file system. A lost node leads to a restart from the last checkpoint on the nodes
# that are left (no fewer than MIN_NODES, default 1), a lost job or one past its time to a requeue that goes on.
#SBATCH --job-name=nanochat
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --no-kill
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # a new one for each attempt: compute.py says why
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}" # seconds for the last checkpoint, of the 120 that --signal gives
case " $* " in *" --resume"*) ;; *) set -- "$@" --resume auto ;; esac
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p) # not head, which would end scontrol by a broken pipe
export MEETING="$first:$((20000 + SLURM_JOB_ID % 10000))"
# shellcheck disable=SC2016  # expanded on the nodes
exec srun --no-kill --wait=0 --kill-on-bad-exit=0 bash -c 'exec .venv/bin/python -m torch.distributed.run \
    --nnodes="${MIN_NODES:-1}:$SLURM_NNODES" --nproc-per-node="${PROCS:-gpu}" --max-restarts="${MAX_RESTARTS:-3}" \
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$MEETING" \
    --rdzv-conf="is_host=$((SLURM_NODEID == 0))" --local-addr="$(hostname)" "$@"' torchrun "$@"
