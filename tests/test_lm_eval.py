"""lm-evaluation-harness scores one model twice: served over the API, and in process by transformers from a bundle.

The harness is heavy, so this is skipped where it is missing: `bash dev/clients.sh` installs and runs it.
"""

import json
import os
import subprocess
import sys

import pytest
import tiny_run
import torch
from tiny_chat import ANSWERS, STORY, running_server, save_tiny_chat, text_of, tiny_chat

from nanochat.hf import convert

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: bash dev/clients.sh")
pytest.importorskip("transformers", reason="the oracle, transformers, is not installed")

TASK = """
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/{task}.jsonl
test_split: test
output_type: {kind}
doc_to_text: "{{{{context}}}}"
"""
CHOOSE = """doc_to_choice: choices
target_delimiter: ""
doc_to_target: 0
metric_list:
  - metric: acc
  - metric: acc_norm
"""
READ = """doc_to_target: "{{context}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
"""
LONG = " ".join(f"On day {i}" for i in range(400))  # longer than the context of 768 tokens
CONTEXTS = ["", "Once there was", STORY[:40], "Hello! Gr", "37*48 is", LONG]
CHOICES = [STORY[40:60], " a model", "!", " 🎉 from"]
TEXTS = [*map(text_of, ANSWERS), "Grüße 🎉", "x", LONG]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Two tasks of the harness, as files: choices after a context (one longer than the model's), and whole texts."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = [json.dumps({"context": context, "choices": CHOICES}) for context in CONTEXTS]
    (folder / "choose.jsonl").write_text("\n".join(lines))
    (folder / "choose.yaml").write_text(TASK.format(task="choose", folder=folder, kind="multiple_choice") + CHOOSE)
    (folder / "read.jsonl").write_text("\n".join(json.dumps({"context": text}) for text in TEXTS))
    (folder / "read.yaml").write_text(TASK.format(task="read", folder=folder, kind="loglikelihood_rolling") + READ)
    return folder


def evaluate(tasks, out, kind, **arguments):
    """What `lm_eval --model ...` finds of each line of both tasks: log-likelihoods, and which choices are greedy."""
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "--model",
        kind,
        "--tasks",
        "choose,read",
        "--include_path",
        str(tasks),
    ]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())]
    command += ["--output_path", str(out), "--log_samples", "--batch_size", "3", "--device", "cpu"]
    own = {"HF_HOME": str(out), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OPENAI_API_KEY": "none"}
    done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    files = [next(out.rglob(f"samples_{task}_*.jsonl")) for task in ("choose", "read")]
    return [json.loads(line)["resps"] for file in files for line in file.read_text().splitlines()]


def numbers(value):
    """Every number in nested lists, in order; the harness writes them as text, and a greedy choice as "True"."""
    if isinstance(value, list):
        return [number for each in value for number in numbers(each)]
    return [float({"True": 1, "False": 0}.get(value, value))]


def test_served_and_in_process_agree(tasks, tmp_path):
    bundle = tmp_path / "bundle"
    with tiny_run.base_dir(save_tiny_chat(tmp_path / "base", "sft")):
        convert.export_checkpoint(bundle, "sft", "tiny")
    with running_server(max_batch=4, model_name="sft/tiny") as server:
        url = f"http://127.0.0.1:{server.port}/v1/completions"
        where = {"model": "sft/tiny", "base_url": url, "num_concurrent": 2, "max_length": 768}
        tokens = {"tokenizer": bundle, "tokenizer_backend": "huggingface", "add_bos_token": True}
        served = evaluate(tasks, tmp_path / "served", "local-completions", **where, **tokens, trust_remote_code=True)
    # Of a long text the harness sends a server the last max_length - 1 tokens, and here reads the last max_length + 1.
    own = {"pretrained": bundle, "dtype": "float32", "max_length": 766, "trust_remote_code": True}
    here = evaluate(tasks, tmp_path / "here", "hf", **own)
    assert numbers(served) == pytest.approx(numbers(here), rel=1e-5, abs=1e-3)
    # And both are right: the choice " a model" of the second line, by a forward of the model.
    model, tokenizer = tiny_chat()
    context = tokenizer.encode(CONTEXTS[1], prepend="<|bos|>")
    ids = context + tokenizer.encode(CHOICES[1])
    logprobs_TV = model(torch.tensor([ids])).detach()[0].log_softmax(-1)
    wanted = sum(float(logprobs_TV[i - 1, ids[i]]) for i in range(len(context), len(ids)))
    assert numbers(served[1])[2:4] == [pytest.approx(wanted, abs=1e-3), 1.0]
