#!/usr/bin/env bash
# From raw text to a chat model you can talk to. Bare run: `bash speedrun.sh`. Short run of every stage: --smoke.
#
# It can be stopped and run again: finished stages are skipped, an unfinished one goes on from its last checkpoint.
#   NANOCHAT_BASE_DIR  where everything is written (default ~/.cache/nanochat)
#   DEPTH              another depth than the hardware's profile has
#   DATASET            another dataset: builtin, climbmix, fineweb-edu, or a folder of your own text
#   TASKS_DIR          a folder of published conversations and tasks, such as smoltalk/train.parquet
#   PRICE              dollars an hour of this machine, for the report
#   WANDB_RUN          name of a wandb run
set -euo pipefail
cd "$(dirname "$0")"

SMOKE=
for argument in "$@"; do
    case $argument in
        --smoke) SMOKE=1 ;;
        -h | --help) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) echo "speedrun.sh: unknown argument $argument (see --help)" >&2; exit 2 ;;
    esac
done
export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
# OpenMP's threads spin while they wait for each other, and so take the core from what they wait for when anything else
# runs. Without spinning an idle machine trains 4 % slower, one with a busy process 1.5 times as fast (dev/LOG.md).
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
mkdir -p "$NANOCHAT_BASE_DIR/runs"

# ---------------------------------------------------------------------------------------------------------------------
# Set-up: a virtual environment with pinned packages

[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
PRESENT=$(nvidia-smi -L 2> /dev/null | grep -c '^GPU') || true # the GPUs that the driver lists
PACKAGES=.
[ "$PRESENT" -eq 0 ] || PACKAGES=".[gpu]" # also FlashAttention-3 and the fused loss
.venv/bin/python -m pip install --quiet --constraint dev/constraints.txt --editable "$PACKAGES"
export PATH="$PWD/.venv/bin:$PATH"

# ---------------------------------------------------------------------------------------------------------------------
# What this machine can do decides the size of the run

GPUS=$(python -c 'import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)')
if [ "$PRESENT" -gt 0 ] && [ "$GPUS" -eq 0 ] && [ -z "${CUDA_VISIBLE_DEVICES+set}" ]; then
    # Without this stop, a node whose driver is too old would silently train the model for two cores.
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1)
    cuda=$(python -c 'import torch; print(torch.version.cuda or "no")')
    echo "speedrun.sh: nvidia-smi lists $PRESENT GPUs, but torch sees none: driver $driver is too old for torch's CUDA $cuda build." \
        "Update the driver, or install into .venv the torch of PyTorch's wheel index for an older CUDA (such as cu126)" >&2
    exit 2
fi
if [ -n "$SMOKE" ]; then
    # a minute: every stage runs, nothing is learnt
    PROFILE=smoke
    DEPTH=${DEPTH:-2} DATASET=${DATASET:-builtin} SHARDS=1 VOCAB=1024
    BASE="--max-seq-len 256 --window-pattern L --head-dim 64 --total-batch-size 2048
        --num-iterations 60 --eval-every 30 --eval-tokens 16384"
    MID="--scale .1 --num-iterations 30"
    SFT="--scale .1 --num-iterations 20"
    EVAL="--eval-tokens 16384 --max-per-task 20"
    CHAT="--max-problems 20 --max-new-tokens 32"
elif [ "$GPUS" -eq 0 ]; then
    # A quarter of an hour on two cores. Deep and narrow: choosing a letter takes recall, then a lookup, layer after
    # layer. The rates are the recipe's over 1.41: at its own the text is learnt better, and choosing worse (dev/LOG.md).
    PROFILE=cpu
    DEPTH=${DEPTH:-6} DATASET=${DATASET:-builtin} SHARDS=8 VOCAB=4096
    BASE="--aspect-ratio 32 --head-dim 64 --max-seq-len 512 --window-pattern L --total-batch-size 8192
        --num-iterations 300 --eval-every 100 --eval-tokens 65536
        --matrix-lr .01414 --embedding-lr .2121 --unembedding-lr .005657"
    MID="--scale 3 --replay 1 --init-lr-frac 2 --warmdown-ratio .5 --total-batch-size 8192
        --num-iterations 330 --eval-every 110"
    SFT="--init-lr-frac 1 --total-batch-size 8192 --num-iterations 140"
    EVAL="--eval-tokens 65536"
    CHAT="--max-problems 200 --max-new-tokens 48"
elif [ "$GPUS" -lt 8 ]; then
    PROFILE=gpu
    DEPTH=${DEPTH:-12} DATASET=${DATASET:-climbmix} SHARDS=40 VOCAB=32768
    BASE="--eval-every 500 --save-every 1000"
    MID="--scale 30"
    SFT="--scale 8"
    EVAL=""
    CHAT="--max-problems 1000 --max-new-tokens 512"
else
    # The GPT-2-grade model, as karpathy/nanochat's pull request 830 shapes it, but with 2^20 tokens a step. How long it
    # should take: python -m dev.bench plan. Every difference from the reference: dev/reference_analysis.md.
    PROFILE=node
    DEPTH=${DEPTH:-22} DATASET=${DATASET:-climbmix} SHARDS=170 VOCAB=49152
    BASE="--target-param-data-ratio 9.4 --total-batch-size 1048576 --device-batch-size 32 --fp8 --norm-scales
        --eval-every 1000"
    MID="--scale 100"
    SFT="--scale 20"
    EVAL=""
    CHAT="--max-problems 2000 --max-new-tokens 512"
fi
TAG="d$DEPTH-$PROFILE"
case $PROFILE-$DATASET in
    gpu-climbmix | gpu-fineweb-edu | node-climbmix | node-fineweb-edu) NETWORK=1 ;;
    *) NETWORK= ;;
esac
# A folder is used whole. Of what this project makes or downloads, SHARDS shards are used.
case $DATASET in
    builtin | climbmix | fineweb-edu) LIMIT="-n $SHARDS" ;;
    *) LIMIT= ;;
esac
DATASET_DIR=$(python -c 'import sys; from nanochat import documents; print(documents.dataset_dir(sys.argv[1]))' "$DATASET")
echo "profile $PROFILE: depth $DEPTH, dataset $DATASET, $GPUS GPUs; everything is written to $NANOCHAT_BASE_DIR"

# ---------------------------------------------------------------------------------------------------------------------
# How a stage is run

# written NAME: print a hash of the files that stage NAME leaves.
written() {
    local files=()
    case $1 in
        # A download goes on while later stages run, so its manifest grows; its text is fixed by the dataset's name.
        dataset) [ -n "$NETWORK" ] || files=("$DATASET_DIR/manifest.json") ;;
        tokenizer) files=("$NANOCHAT_BASE_DIR/tokenizer/tokenizer.json") ;;
        tok_eval) files=("$NANOCHAT_BASE_DIR/evals/tok_eval.json") ;;
        base_train) files=("$NANOCHAT_BASE_DIR/checkpoints/base/$TAG"/*/meta.json) ;;
        mid_train) files=("$NANOCHAT_BASE_DIR/checkpoints/mid/$TAG"/*/meta.json) ;;
        chat_sft) files=("$NANOCHAT_BASE_DIR/checkpoints/sft/$TAG"/*/meta.json) ;;
        base_eval) files=("$NANOCHAT_BASE_DIR/evals/base_eval_base_$TAG.json") ;;
        chat_eval_*) files=("$NANOCHAT_BASE_DIR/evals/$1_$TAG.json") ;;
    esac
    { cat /dev/null ${files[@]+"${files[@]}"} 2> /dev/null || true; } | git hash-object --stdin
}

# contents FOLDER: print a hash of the names and bytes of a folder's files, or of nothing if it is not a folder.
contents() {
    local files=
    [ ! -d "$1" ] || files=$(find -L "$1" -type f | sort)
    { echo "$files"; [ -z "$files" ] || git hash-object --no-filters --stdin-paths <<< "$files"; } | git hash-object --stdin
}

# stage NAME COMMAND...: run it once. All runs share dataset and tokenizer, and another run may have replaced them.
# So a stage is done only if its mark holds this command, what the stages before it wrote, and what it wrote itself.
READ=$(contents "$DATASET")
stage() {
    local name=$1 mark="$NANOCHAT_BASE_DIR/runs/.done-$TAG-$1" began=$SECONDS
    shift
    if [ "$(cat "$mark" 2> /dev/null)" = "$*$READ $(written "$name")" ]; then
        echo "== $name: done before"
    else
        echo "== $name: $*"
        "$@"
        echo "{\"stage\": \"$name\", \"tag\": \"$TAG\", \"seconds\": $((SECONDS - began))}" >> "$NANOCHAT_BASE_DIR/runs/stages.jsonl"
        echo "$*$READ $(written "$name")" > "$mark"
    fi
    case $name in
        *eval*) ;; # no stage reads what an evaluation writes
        *) READ="$READ $(written "$name")" ;;
    esac
}

# After a request to stop, torchrun waits this many seconds before it kills its processes. Its default of 30 is too short
# to write a checkpoint of 13 GB to a slow disk. Older versions of torchrun ignore the variable.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}"
# train NAME MODULE FLAGS...: a training stage on all GPUs, resumed where it was left
RUN="python -m"
[ "$GPUS" -le 1 ] || RUN="torchrun --standalone --nproc_per_node=$GPUS -m"
train() {
    stage "$1" $RUN "$2" "${@:3}" --model-tag "$TAG" --resume auto ${WANDB_RUN:+--run "$WANDB_RUN-$1"}
}
tasks=()
[ -z "${TASKS_DIR:-}" ] || tasks=(--tasks-dir "$TASKS_DIR")

# ---------------------------------------------------------------------------------------------------------------------
# Text and a tokenizer made for it; conversations and tasks to train on and to be measured by

if [ -z "$NETWORK" ]; then
    stage dataset python -m nanochat.dataset --name "$DATASET" $LIMIT
else
    # Eight shards are enough for the tokenizer. The others arrive while the model trains, which waits where it must.
    stage dataset python -m nanochat.dataset --name "$DATASET" -n 8
    [ -n "${TASKS_DIR:-}" ] || stage tasks python -m tasks.public
    EVAL="--bundle core"
fi
stage tokenizer python -m scripts.tok_train --dataset "$DATASET" --vocab-size "$VOCAB"
stage tok_eval python -m scripts.tok_eval --dataset "$DATASET"
if [ -n "$NETWORK" ]; then
    log="$NANOCHAT_BASE_DIR/runs/download.log" manifest="$DATASET_DIR/manifest.json"
    python -m nanochat.dataset --name "$DATASET" -n "$SHARDS" > "$log" 2>&1 &
    download=$!
    trap 'kill $download 2> /dev/null || true' EXIT
    # The manifest lists all shards as soon as the download has begun; before that a run would take eight for all.
    until [ "$(grep -c '"file"' "$manifest")" -gt "$SHARDS" ]; do
        kill -0 $download 2> /dev/null || { cat "$log" >&2; exit 2; }
        sleep 1
    done
fi

# ---------------------------------------------------------------------------------------------------------------------
# Pretraining: the model learns language and the world from plain text

train base_train scripts.base_train --depth "$DEPTH" --dataset "$DATASET" $BASE
stage base_eval $RUN scripts.base_eval --model-tag "$TAG" $EVAL
READ="$READ $(contents "${TASKS_DIR:-}")"
stage chat_eval_base $RUN scripts.chat_eval --stage base --model-tag "$TAG" $CHAT ${tasks[@]+"${tasks[@]}"}

# ---------------------------------------------------------------------------------------------------------------------
# Midtraining: the form of a conversation, tools and multiple choice

train mid_train scripts.mid_train --source-tag "$TAG" $MID ${tasks[@]+"${tasks[@]}"}
stage chat_eval_mid $RUN scripts.chat_eval --stage mid --model-tag "$TAG" $CHAT ${tasks[@]+"${tasks[@]}"}

# ---------------------------------------------------------------------------------------------------------------------
# Fine-tuning: the conversations it should lead, and who it is

train chat_sft scripts.chat_sft --source-tag "$TAG" $SFT ${tasks[@]+"${tasks[@]}"}
stage chat_eval_sft $RUN scripts.chat_eval --stage sft --model-tag "$TAG" $CHAT ${tasks[@]+"${tasks[@]}"}

# ---------------------------------------------------------------------------------------------------------------------
# The report, and first answers

python -m scripts.report ${PRICE:+--price "$PRICE"}
for question in "What is the capital of France?" "What is 37*48?" "How many r are in strawberry?" "Who are you?"; do
    echo "> $question"
    python -m scripts.chat_cli --model-tag "$TAG" -p "$question"
done
echo
echo "Report: $NANOCHAT_BASE_DIR/report/report.md"
echo "Chat:   .venv/bin/python -m scripts.chat_cli     (in the terminal)"
echo "        .venv/bin/python -m scripts.chat_web     (in the browser)"
