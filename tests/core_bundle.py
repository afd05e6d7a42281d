"""What the tests of CORE share: bundles made for them, tiny models, and where the real rows are."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanochat.gpt import GPT, GPTConfig

ROOT = Path(__file__).resolve().parent.parent
BUNDLE = ROOT.parent / "shared" / "data" / "eval_bundle"
needs_bundle = pytest.mark.skipif(not BUNDLE.is_dir(), reason="no ../shared/data/eval_bundle here")

CHOICE = {"query": "Sky?", "choices": ["blue", "black"], "gold": 0}
SCHEMA = {"context_options": ["The cat", "The dog"], "continuation": "barked.", "gold": 1}
CLOZE = {"context": " Two and two are ", "continuation": "four"}


def tiny_model(vocab_size, sequence_len, n_layer=1):
    """Random weights in every tensor, so that no two options come out alike."""
    torch.manual_seed(0)
    shape = {"n_layer": n_layer, "n_head": 2, "n_kv_head": 1, "n_embd": 32}
    model = GPT(GPTConfig(sequence_len=sequence_len, vocab_size=vocab_size, **shape)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


class Foreign:
    """A model of another library as the evaluation sees it: nothing but `model(idx_BT) -> logits_BTV`."""

    def __init__(self, model, context):
        self.model, self.config = model, SimpleNamespace(sequence_len=context)

    def __call__(self, idx_BT):
        return self.model(idx_BT).logits


def random_gpt2(vocab_size, context):
    """GPT-2 as transformers has it, small, with random weights large enough to have opinions."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": context, "vocab_size": vocab_size}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def write_bundle(folder, tasks):
    """tasks: label -> (kind, shots, baseline in percent, rows or None for no file)."""
    (folder / "eval_data").mkdir(parents=True)
    lines, table = ["icl_tasks:"], ["Eval Task,Random baseline"]
    for label, (kind, shots, baseline, rows) in tasks.items():
        lines += [f"- {{label: {label}, dataset_uri: {label}.jsonl, num_fewshot: [{shots}], icl_task_type: {kind}}}"]
        table.append(f"{label},{baseline}")
        if rows is not None:
            text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
            (folder / "eval_data" / f"{label}.jsonl").write_text(text)
    (folder / "core.yaml").write_text("\n".join(lines))
    (folder / "eval_meta_data.csv").write_text("\n".join(table) + "\n")
    return folder
