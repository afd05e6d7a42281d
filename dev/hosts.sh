#!/usr/bin/env bash
# One training job on several hosts over ssh: bash dev/hosts.sh "node1 node2" -m scripts.base_train --depth 20
#
# Every host has this folder at this path and sees the same NANOCHAT_BASE_DIR (a shared file system). The hosts meet at
# the first one, which must last; when another is lost the rest go on from the last checkpoint, when it comes back
# (start this script's command there again) all do. A host may be given as name=address where the name does not lead there.
#   PROCS          processes on each host (default: one a GPU)     MIN_HOSTS     fewest hosts to go on with (default 1)
#   MAX_RESTARTS   default 3     PORT   of the meeting, default 29400     RDZV_CONF   more settings of the meeting
#   RUN_ON         how to run a command line on a host, default "ssh -tt"
#   PYTHON         Python on the hosts, default: this folder's .venv where there is one, else python3
# NANOCHAT_TIMEOUT is how many seconds a process waits for the others before it takes them for dead (default 600).
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: bash dev/hosts.sh \"HOST[=ADDRESS] ...\" -m SCRIPT [FLAGS]" >&2
    exit 2
fi
root=$(cd "$(dirname "$0")/.." && pwd)
read -ra hosts <<< "$1"
shift
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # a new one for each attempt: compute.py says why
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}" # seconds for the last checkpoint
case " $* " in *" --resume"*) ;; *) set -- "$@" --resume auto ;; esac

python=python3
[ ! -x "$root/.venv/bin/python" ] || python=.venv/bin/python
settings=()
while IFS='=' read -r name _; do
    settings+=("$name=${!name}")
done < <(env | grep -E '^(NANOCHAT|OMP|GLOO|NCCL|TORCH|CUDA|WANDB)_[A-Z_]*=')

run_id=$(date +%s)
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT
for i in "${!hosts[@]}"; do
    command=(env "${settings[@]}" "${PYTHON:-$python}" -m torch.distributed.run
        --nnodes="${MIN_HOSTS:-1}:${#hosts[@]}" --nproc-per-node="${PROCS:-gpu}" --max-restarts="${MAX_RESTARTS:-3}"
        --rdzv-backend=c10d --rdzv-id="$run_id" --rdzv-endpoint="${hosts[0]#*=}:${PORT:-29400}"
        --rdzv-conf="is_host=$((i == 0))${RDZV_CONF:+,$RDZV_CONF}" --local-addr="${hosts[i]#*=}" "$@")
    ${RUN_ON:-ssh -tt} "${hosts[i]%%=*}" "cd $(printf '%q' "$root") && exec $(printf '%q ' "${command[@]}")" &
    [ "$i" != 0 ] || first=$!
done
wait "$first" # the others may have been lost on the way
