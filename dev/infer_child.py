"""A model of another program, for scripts.infer_bench: reads a batch size a line, writes the seconds that it took.

    python dev/infer_child.py nanochat CHECKOUT '{"n_layer": ..., "dtype": ..., ...}'
    python dev/infer_child.py transformers '' '{...}'

No file of the checkout is changed. Greedy; its random weights never end an answer before its length.
"""

import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def randomise(model: torch.nn.Module) -> None:
    """No weight stays zero, as some are at first: zeros flatter products."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def nanochat(root: str, shape: dict[str, Any]) -> Callable[[list[int], int, int], None]:
    """karpathy/nanochat at `root`: answers to one prompt are samples of it, as its engine makes batches."""
    own = Path(__file__).resolve().parent.parent
    sys.dont_write_bytecode = True
    sys.path = [root, *(path for path in sys.path[1:] if Path(path or ".").resolve() != own)]
    from nanochat.engine import Engine
    from nanochat.gpt import GPT, GPTConfig

    names = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern")
    model = GPT(GPTConfig(**{name: shape[name] for name in names}))
    model.init_weights()
    randomise(model)

    class Tokenizer:
        """Special tokens that no model can sample."""

        def encode_special(self, name: str) -> int:
            return -1

        def get_bos_token_id(self) -> int:
            return -1

    engine = Engine(model.eval(), Tokenizer())

    def run(prompt: list[int], size: int, new_tokens: int) -> None:
        n = sum(1 for _ in engine.generate(prompt, num_samples=size, max_tokens=new_tokens, temperature=0.0))
        assert n == new_tokens

    return run


def transformers(root: str, shape: dict[str, Any]) -> Callable[[list[int], int, int], None]:
    """transformers' NanoChat, the nearest to our architecture that it has, by `generate` with a batch of prompts."""
    from transformers import NanoChatConfig, NanoChatForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    config = NanoChatConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["n_embd"],
        intermediate_size=4 * shape["n_embd"],
        num_hidden_layers=shape["n_layer"],
        num_attention_heads=shape["n_head"],
        num_key_value_heads=shape["n_kv_head"],
        max_position_embeddings=shape["sequence_len"],
    )
    model = NanoChatForCausalLM(config).to(getattr(torch, shape["dtype"])).eval()
    randomise(model)

    def run(prompt: list[int], size: int, new_tokens: int) -> None:
        ids = torch.tensor([prompt] * size)
        lengths = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **lengths)
        assert out.shape == (size, len(prompt) + new_tokens)

    return run


def main() -> None:
    kind, root, settings = sys.argv[1:]
    shape = json.loads(settings)
    run = {"nanochat": nanochat, "transformers": transformers}[kind](root, shape)
    for line in sys.stdin:
        size, prompt = int(line), random.choices(range(shape["vocab_size"]), k=shape["prompt_tokens"])
        seconds = []
        for n in (1, shape["new_tokens"]):
            began = time.perf_counter()
            run(prompt, size, n)
            seconds.append(time.perf_counter() - began)
        print(json.dumps([seconds[0], seconds[1] - seconds[0]]), file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    main()
