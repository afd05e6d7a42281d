"""A small GPT, every parameter random: as initialised, layers add nothing, and a wrong cache would not show."""

import torch

from nanochat.gpt import GPT, GPTConfig


def random_model(vocab_size: int = 61, seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> GPT:
    """Four layers of width 64, two query heads to a kv head, windows of 128 in a context of 384; or with changes."""
    shape = {"sequence_len": 384, "n_layer": 4, "n_head": 4, "n_kv_head": 2, "n_embd": 64, "window_pattern": "SSSL"}
    model = GPT(GPTConfig(vocab_size=vocab_size, **{**shape, **changes}), dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.25 if parameter.dim() == 2 else 0.7, generator=generator)
    return model.eval()
