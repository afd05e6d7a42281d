"""`python -m dev.compare --parity`: both sides on the same rows with the same hyperparameters, in fp32.

Two experiments on 10,000 characters: from each side's own starting weights (evaluation losses within 5 %), and from
equal ones, copied by name (training losses within 1e-3 over the first 20 steps).
"""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dev.bench_old import markdown_table
from dev.compare_sides import (
    Ours,
    Outcome,
    Reference,
    prepare_ours,
    prepare_reference,
    save_rows,
    save_validation_rows,
)
from nanochat import recipe
from nanochat.dataloader import RowLoader
from nanochat.dataset import list_shards
from nanochat.documents import iterate_documents
from nanochat.gpt import GPT, GPTConfig
from nanochat.token_shards import TextRows
from nanochat.tokenizer import load_tokenizer

CHARACTERS, VOCAB, SEQ_LEN, ROWS, SEED = 10_000, 512, 128, 4, 1337
STEPS = {"equal": 20, "own": 60}
EVAL_EVERY, EVAL_WITHIN, LOSS_WITHIN = 5, 0.05, 1e-3
# At 0.5, the rate of large batches, a step of 512 tokens throws the scalars about and every rounding error with them
WEIGHT_DECAY, SCALAR_LR, SCALAR_EPS = 0.1, 0.05, 1e-6  # the last is our optimizer's own

_NAMES = {
    "embed.weight": "transformer.wte.weight",
    "head.weight": "lm_head.weight",
    "resid_scale": "resid_lambdas",
    "embed_skip": "x0_lambdas",
    "smear_gate.weight": "smear_gate.weight",
    "smear_scale": "smear_lambda",
    "backout": "backout_lambda",
}
_BLOCK_NAMES = {
    "attn.q": "attn.c_q",
    "attn.k": "attn.c_k",
    "attn.v": "attn.c_v",
    "attn.out": "attn.c_proj",
    "attn.gate": "attn.ve_gate",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}


MATCHED = (
    "Matched: the rows of every step and evaluation, fp32, eager, shapes, learning rates and weight decay after each "
    "side's own scaling, 2 steps of warmup, no decay. Set inside the reference, which has no flag: learning rate "
    f"{0.4 * SCALAR_LR:g} of smear and backout (its own: 0.2), AdamW epsilon {SCALAR_EPS:g} of scalars (its own: "
    "1e-10). Equal starting weights are ours, with uniform values within .02 in head and projections that begin at "
    "zero. Not matched from own weights: our smear begins at 1, the reference's at 0."
)


def reference_weights(weights: Mapping[str, torch.Tensor], head_dim: int) -> dict[str, torch.Tensor]:
    """Our state dict under the reference's names, such that both models are the same function.

    Its rotary embedding turns the other way: the second half of each query and key head changes sign, which mirrors
    the planes of rotation. Its scalars have one dimension.
    """
    result = {}
    for name, value in weights.items():
        if name.startswith("blocks."):
            _, layer, rest = name.split(".", 2)
            part = rest.removesuffix(".weight")
            if part in ("attn.q", "attn.k"):
                sign = torch.ones(head_dim)
                sign[head_dim // 2 :] = -1
                value = value * sign.repeat(len(value) // head_dim)[:, None]
            name = f"transformer.h.{layer}.{_BLOCK_NAMES[part]}.weight"
        elif not name.startswith("value_embeds."):
            name = _NAMES[name]
        result[name] = value.reshape(1) if value.dim() == 0 else value.clone()
    return result


def matched_flags(config: GPTConfig) -> tuple[list[str], list[str]]:
    """Flags for (us, the reference) that lead to equal learning rates and weight decay, each side scaling its own."""
    batch = ROWS * SEQ_LEN
    scales = recipe.learning_rate_scales(batch)
    root = (batch / recipe.REFERENCE_BATCH) ** 0.5
    twelve = recipe.model_config(12, config.vocab_size, SEQ_LEN, head_dim=config.head_dim)
    decay = root * recipe.scaling_parameters(twelve) / recipe.scaling_parameters(config)
    rates = {name: lr * scales[name] for name, lr in recipe.LEARNING_RATES.items()} | {"scalar": SCALAR_LR}
    both = ["--warmdown-ratio", "0", "--warmup-steps", str(min(STEPS.values()) // 10)]  # we cut it to a tenth of a run
    ours = itertools.chain.from_iterable([f"--{name}-lr", repr(lr / scales[name])] for name, lr in rates.items())
    theirs = itertools.chain.from_iterable([f"--{name}-lr", repr(lr / root)] for name, lr in rates.items())
    return (
        [*both, *ours, "--weight-decay", repr(WEIGHT_DECAY)],
        [*both, *theirs, "--weight-decay", repr(WEIGHT_DECAY / decay)],
    )


def starting_weights(config: GPTConfig) -> dict[str, torch.Tensor]:
    """Weights to begin with: ours, but with small values where the projections begin at zero.

    With zeros the first gradients of most parameters are rounding noise, which both optimizers blow up to full steps.
    """
    generator = torch.Generator().manual_seed(SEED)
    model = GPT(config)
    model.init_weights(generator)
    for name, value in model.state_dict().items():
        if name.endswith(("attn.out.weight", "mlp.down.weight", "head.weight")):
            value.uniform_(-0.02, 0.02, generator=generator)
    return model.state_dict()


def prepare_text(folder: Path, data: str) -> None:
    """Write the first 10,000 characters of prepared dataset `data`: seven tenths to train on, the rest to score."""
    folder.mkdir(parents=True, exist_ok=True)
    text = ""
    for document in iterate_documents(list_shards(data, "train")):
        text += document + "\n"
        if len(text) >= CHARACTERS:
            break
    if len(text) < CHARACTERS:
        raise ValueError(f"--data {data} has {len(text)} characters: --parity needs {CHARACTERS}")
    cut = CHARACTERS * 7 // 10
    for name, part in (("0-train", text[:cut]), ("1-val", text[cut:CHARACTERS])):
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": part}) + "\n", encoding="utf-8")


def verdict(start: str, ours: Outcome, theirs: Outcome) -> dict[str, Any]:
    """Compare two runs. The evaluation losses are those of the same tokens, so their ratio is that of bits per byte."""
    steps = sorted(set(ours.evals) & set(theirs.evals) - {0})
    evals = [{"step": n, "ours": ours.evals[n], "reference": theirs.evals[n]} for n in steps]
    apart = max(abs(row["ours"] / row["reference"] - 1) for row in evals)
    losses = list(zip(ours.losses, theirs.losses))
    difference = max(abs(a - b) for a, b in losses[: STEPS["equal"]])
    passed = difference <= LOSS_WITHIN if start == "equal" else apart <= EVAL_WITHIN
    result = {"start": start, "passed": passed, "evals_apart": apart, "losses_apart_20": difference}
    return {**result, "evals": evals, "losses": losses}


def run_parity(work: Path, data: str, checkout: Path, depth: int, head_dim: int, device: str) -> list[dict[str, Any]]:
    """Both experiments on the prepared dataset `data`; see `verdict` for what comes back."""
    folder = work / f"parity-d{depth}"
    prepare_text(folder / "text", data)
    text = str((folder / "text").resolve())
    tokenizer = prepare_ours(folder / "ours", text, VOCAB, folder / "logs")
    prepare_reference(folder / "reference", text, tokenizer)
    config = recipe.model_config(depth, tokenizer.get_vocab_size(), SEQ_LEN, head_dim=head_dim, window_pattern="L")
    rows = RowLoader(TextRows(text, "train", load_tokenizer(), SEQ_LEN), ROWS, ROWS, SEED)
    files = {name: str(folder / f"{name}.pt") for name in ("train", "val", "ours", "theirs")}
    save_rows(Path(files["train"]), (batch for step in range(max(STEPS.values()) + 1) for batch in rows.step(step)))
    eval_tokens = save_validation_rows(Path(files["val"]), text, SEQ_LEN, CHARACTERS, ROWS)
    weights = starting_weights(config)
    torch.save(weights, files["ours"])
    torch.save(reference_weights(weights, config.head_dim), files["theirs"])

    shape = {"depth": depth, "head-dim": head_dim, "window-pattern": "L", "max-seq-len": SEQ_LEN}
    batch = {"device-batch-size": ROWS, "total-batch-size": ROWS * SEQ_LEN, "device-type": device}
    shared = {**shape, **batch, "eval-every": EVAL_EVERY, "eval-tokens": eval_tokens}
    our_flags, their_flags = matched_flags(config)
    our_flags += ["--dataset", text, "--seed", str(SEED), "--no-compile"]
    results = []
    for start, steps in STEPS.items():
        given = {"train": files["train"], "val": files["val"], "eager": "yes"}
        given["scalars"] = [0.4 * SCALAR_LR, SCALAR_EPS]
        given |= {"start": files["theirs"]} if start == "equal" else {}
        theirs = Reference("reference", folder / "reference", "float32", their_flags, given, checkout)
        given = {"start": files["ours"]} if start == "equal" else {}
        ours = Ours("ours", folder / "ours", "float32", our_flags, given)
        flags = [f"--{name}={value}" for name, value in {**shared, "num-iterations": steps}.items()]
        print(f"parity of d{depth} from {start} starting weights", flush=True)
        outcomes = [side.run(flags, folder / "logs" / f"{start}-{side.name}.log") for side in (ours, theirs)]
        results.append({"depth": depth, **verdict(start, *outcomes)})
    return results


def parity_page(results: list[dict[str, Any]]) -> str:
    """The experiments as a page."""
    limits = f"evaluations within {EVAL_WITHIN:.0%}, losses of {STEPS['equal']} steps within {LOSS_WITHIN}"
    page = f"# Parity: {limits}\n\n{MATCHED}\n\n"
    for result in results:
        word = "pass" if result["passed"] else "FAIL"
        page += f"d{result['depth']} from {result['start']} starting weights: **{word}**; evaluations apart "
        page += f"{result['evals_apart']:.2%}, losses {result['losses_apart_20']:.2g}.\n\n"
        page += f"{markdown_table(result['evals'])}\n"
    return page
