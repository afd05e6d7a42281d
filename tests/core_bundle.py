"""What the tests of CORE share: bundles made for them, tiny models, and where the real rows are."""

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanochat.core_eval import read_tasks
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
    """A model of another library as the oracle calls it: `model(idx_BT) -> logits_BTV`."""

    def __init__(self, model, context):
        self.model = model
        self.config = SimpleNamespace(sequence_len=context)

    def __call__(self, idx_BT):
        return self.model(idx_BT).logits


class Fixed:
    """A model whose logits follow from the position alone, and which notes what it reads."""

    def __init__(self, logits_TV):
        self.logits_TV = logits_TV
        self.config = SimpleNamespace(sequence_len=len(logits_TV))
        self.device = torch.device("cpu")
        self.read = []

    def __call__(self, idx_N, *, context, wanted_R):
        self.read.append(idx_N.tolist())
        return self.logits_TV[context.positions[wanted_R]]


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


@torch.no_grad()
def oracle_core(model, tokenizer, bundle, max_per_task):
    """The protocol once more from its definition: by task the outcome of each row, and all log-likelihoods."""
    limit, results = model.config.sequence_len, {}

    def log_probabilities(ids):  # of each token but the first, given those before it
        logits = model(torch.tensor([ids]))[0].double()
        return logits[:-1].log_softmax(-1)

    def tokens(text):
        return [tokenizer.get_bos_token_id(), *tokenizer.encode(text)]

    for task in read_tasks(bundle):
        rows = [json.loads(line) for line in task.path.read_text(encoding="utf-8").split("\n") if line]
        random.Random(1337).shuffle(rows)
        kept = rows[:max_per_task]
        outcomes, likelihoods = "", []
        for i, row in enumerate(kept):
            pool = kept if len(kept) - 1 >= task.shots else rows
            others = [r for j, r in enumerate(pool) if j != i]
            shown = random.Random(1234 + i).sample(others, min(task.shots, len(others)))
            prompt, d = "", task.delimiter
            for r in shown:
                if task.kind == "multiple_choice":
                    prompt += f"{r['query']}{d}{r['choices'][r['gold']]}\n\n"
                elif task.kind == "schema":
                    prompt += f"{r['context_options'][r['gold']]}{d}{r['continuation']}\n\n"
                else:
                    prompt += f"{r['context'].strip()}{d}{r['continuation']}\n\n"
            if task.kind == "language_modeling":
                bare = tokens((prompt + row["context"].strip() + d).rstrip())
                full = tokens(prompt + row["context"].strip() + d + row["continuation"])
                scored = len(full) - next((k for k in range(len(bare)) if bare[k] != full[k]), len(bare))
                full = full[-limit:]
                scored = min(scored, len(full) - 1)
                logp = log_probabilities(full)
                outcomes += str(int(logp.argmax(-1).tolist()[-scored:] == full[-scored:]))
                likelihoods.append(sum(logp[t - 1, full[t]].item() for t in range(len(full) - scored, len(full))))
                continue
            if task.kind == "multiple_choice":
                options = [tokens(prompt + row["query"] + d + choice) for choice in row["choices"]]
                shared = 0
                while all(shared < len(o) and o[shared] == options[0][shared] for o in options):
                    shared += 1
                lengths = [len(o) - shared for o in options]
            else:
                options = [tokens(prompt + context + d + row["continuation"]) for context in row["context_options"]]
                shared = 0
                while all(shared < len(o) and o[-1 - shared] == options[0][-1 - shared] for o in options):
                    shared += 1
                lengths = [shared] * len(options)
            best, best_loss = 0, None
            for k, (option, length) in enumerate(zip(options, lengths)):
                option = option[-limit:]
                length = min(length, len(option) - 1)
                logp = log_probabilities(option)
                picked = [logp[t - 1, option[t]].item() for t in range(len(option) - length, len(option))]
                likelihoods.append(sum(picked))
                loss = -sum(picked) / length if length else math.nan
                if best_loss is None or loss < best_loss:
                    best, best_loss = k, loss
            outcomes += str(int(best == row["gold"]))
        results[task.label] = outcomes, likelihoods
    return results
