"""Memory of a server by depth, counted, not measured: python -m dev.serving_size --depths 6,12,20,24

tests/test_deployment.py holds the count against the tensors that a real engine makes.
"""

from dataclasses import dataclass
from typing import Any

import torch

from dev.bench_old import markdown_table
from nanochat import cli, recipe
from nanochat.gpt import GPT, GPTConfig
from nanochat.kv_cache import ROUND, KVCache, LayerNeed


@dataclass(frozen=True)
class Config:
    """Flags."""

    depths: str = cli.option("6,12,20,24", "depths, by commas")
    vocab_size: int = cli.option(32768, "vocabulary")
    context: int = cli.option(2048, "context")
    max_batch: int = cli.option(32, "answers made at the same time")
    item_bytes: int = cli.option(2, "bytes of a number: 2 for bfloat16, 4 for float32")


def cache_bytes(config: GPTConfig, max_batch: int, item_bytes: int) -> tuple[int, int]:
    """Cache memory of a token that all layers keep, and of a whole context, in bytes: layers with a window keep a ring
    of it. max_batch: decides how many tokens a step may read, for which rings have room."""
    needs = [LayerNeed(config.n_kv_head, config.head_dim, window) for window in config.windows]
    chunk = max(256, 2 * max_batch)  # as in Engine
    rings = KVCache(torch.device("cpu"), needs, config.sequence_len, chunk).rings
    slots = -(-(config.sequence_len + 1) // ROUND) * ROUND
    layer = [2 * need.kv_heads * need.head_dim * item_bytes for need in needs]
    return sum(layer), sum(size * min(slots, ring or slots) for size, ring in zip(layer, rings, strict=True))


def size(depth: int, flags: Config) -> dict[str, Any]:
    """A line of the table."""
    config = recipe.model_config(depth, flags.vocab_size, flags.context)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in GPT(config).parameters())
    token, context = cache_bytes(config, flags.max_batch, flags.item_bytes)
    weights = parameters * flags.item_bytes
    return {
        "depth": depth,
        "parameters, M": round(parameters / 1e6),
        "weights, GiB": round(weights / 2**30, 2),
        "cache a token, KiB": round(token / 2**10),
        "a full context, MiB": round(context / 2**20),
        f"{flags.max_batch} full contexts, GiB": round(flags.max_batch * context / 2**30, 2),
    }


def main() -> None:
    flags = cli.parse(Config, description=__doc__)
    print(markdown_table([size(int(depth), flags) for depth in flags.depths.split(",")]))


if __name__ == "__main__":
    cli.run(main)
