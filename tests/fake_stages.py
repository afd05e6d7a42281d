"""A stand-in for Python under speedrun.sh: in place of its results, each stage writes the hash of all that it reads."""

import glob
import hashlib
import os
import sys


def folder_of(base: str, dataset: str) -> str:
    return f"{base}/datasets/{os.path.basename(dataset).replace(' ', '-')}"


def write(path: str, *read: str) -> None:
    """Write the command, and a hash of it and of the files `read`, with their names."""
    digest = hashlib.sha256(" ".join(sys.argv).encode())
    for name in read:
        with open(name, "rb") as file:
            digest.update(os.path.basename(name).encode() + file.read())
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.write(f"{' '.join(sys.argv[2:])} {digest.hexdigest()}")


def main() -> None:
    base = os.environ["NANOCHAT_BASE_DIR"]
    if sys.argv[1] == "-c":  # how many GPUs are there, or where is a dataset kept?
        print(folder_of(base, sys.argv[3]) if len(sys.argv) > 3 else 0)
        return
    module = sys.argv[2]
    if module in ("pip", "scripts.chat_cli"):
        return
    with open(f"{base}/calls", "a", encoding="utf-8") as calls:
        calls.write(f"{module}\n")
    if os.path.exists(f"{base}/stop-{module}"):
        os.remove(f"{base}/stop-{module}")
        sys.exit(130)

    flags = dict(zip(sys.argv, sys.argv[1:]))
    tag = flags.get("--model-tag") or flags.get("--source-tag")
    dataset = flags.get("--name") or flags.get("--dataset", "")
    manifest = f"{folder_of(base, dataset)}/manifest.json"
    tokenizer = f"{base}/tokenizer/tokenizer.json"
    metas = {stage: f"{base}/checkpoints/{stage}/{tag}/step_1/meta.json" for stage in ("base", "mid", "sft")}
    if module == "nanochat.dataset":
        write(manifest, *sorted(glob.glob(f"{dataset}/*")))
    elif module == "scripts.tok_train":
        write(tokenizer, manifest)
    elif module == "scripts.tok_eval":
        write(f"{base}/evals/tok_eval.json", tokenizer, manifest)
    elif module == "scripts.base_train":
        write(metas["base"], tokenizer, manifest)
    elif module == "scripts.mid_train":
        write(metas["mid"], metas["base"], *glob.glob(f"{flags.get('--tasks-dir')}/*"))
    elif module == "scripts.chat_sft":
        write(metas["sft"], metas["mid"], *glob.glob(f"{flags.get('--tasks-dir')}/*"))
    elif module == "scripts.base_eval":
        write(f"{base}/evals/base_eval_base_{tag}.json", metas["base"])
    elif module == "scripts.chat_eval":
        write(f"{base}/evals/chat_eval_{flags['--stage']}_{tag}.json", metas[flags["--stage"]])


if __name__ == "__main__":
    main()
