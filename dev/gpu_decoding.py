"""Part 4 of dev/gpu_check.py: decoding, with and without CUDA graphs, and the engine's numbers against the model's."""

import functools
from typing import Any
from unittest import mock

import torch

from dev.gpu_bench import Bench, Check, Row
from nanochat.engine import Engine, Request
from nanochat.gpt import GPT
from nanochat.language_model import LanguageModel
from scripts import infer_bench
from scripts.infer_bench import NO_TOKENIZER, EngineSide, measure_batches, open_model

BATCHES = (1, 32)


def decoding(bench: Bench) -> list[Check]:
    """List the checks of part 4."""
    return [
        Check("decoding, graphs on", functools.partial(speed, graphs=True)),
        Check("decoding, graphs off", functools.partial(speed, graphs=False)),
        Check("engine against model", agreement),
    ]


def settings(bench: Bench) -> infer_bench.Config:
    """Return the benchmark's flags: the larger model, with random weights."""
    sizes = bench.sizes
    return infer_bench.Config(
        depth=sizes.fp8_depth,
        vocab_size=sizes.vocab_size,
        sequence_len=sizes.sequence_len,
        head_dim=sizes.head_dim,
        window_pattern="SSSL",
        batches=",".join(map(str, BATCHES)),
        prompt_tokens=sizes.prompt_tokens,
        new_tokens=sizes.new_tokens,
        prefix_tokens=sizes.prompt_tokens,
        clients=max(BATCHES),
        rounds=sizes.rounds,
    )


def speed(bench: Bench, graphs: bool) -> list[Row]:
    """Measure greedy decoding by the engine. graphs: replay steps, as CUDA graphs (on a CPU: as traces)."""
    config = settings(bench)
    with mock.patch.object(LanguageModel, "graphs", graphs):  # the engine asks the model whether it may
        side = EngineSide(open_model(config, bench.compute), config)
    rows = []
    for line in measure_batches([side], config):
        # What a step has to read: the weights, and of each request the keys and values of half of its answer.
        length = config.prompt_tokens + config.new_tokens / 2
        n_bytes = side.weight_bytes + line["batch"] * length * side.engine.bytes_per_token
        row = {
            "row": f"decoding batch {line['batch']}, graphs {'on' if graphs else 'off'}",
            "ms": line["ms a step"],
            "tokens/s": line["tokens/s"],
            "share": bench.share("memory", n_bytes / line["ms a step"] * 1e3),
            "first token ms": line["first token ms"],
        }
        rows.append(row)
    return rows


@torch.inference_mode()
def agreement(bench: Bench) -> list[Row]:
    """Compare the log-probabilities that the engine samples from with those of the model, which reads whole rows.

    The error is the largest difference in nats, over the likeliest tokens at each position of greedy answers.
    """
    config = settings(bench)
    model: Any = open_model(config, bench.compute)
    assert isinstance(model, GPT)
    engine = Engine(model, NO_TOKENIZER, max_batch=4)
    requests = []
    for n in range(4):  # prompts of different lengths decode together
        generator = torch.Generator().manual_seed(n)
        prompt = torch.randint(config.vocab_size, (config.prompt_tokens + n,), generator=generator).tolist()
        requests.append(Request(prompt, max_tokens=config.new_tokens, temperature=0.0, logprobs=5))
    engine.run(requests)
    largest = 0.0
    for request in requests:
        idx_1T = torch.tensor([[*request.tokens, *request.output]], device=bench.device)
        logprobs_TV = model(idx_1T)[0].log_softmax(dim=-1).cpu()
        for place, token_score in enumerate(request.scores, start=len(request.tokens) - 1):
            for token, logprob in token_score.top.items():
                largest = max(largest, abs(logprob - float(logprobs_TV[place, token])))
    return [{"error": largest}]
