"""Sampling against exact probabilities, OpenAI's and the papers' formulas, and transformers' logits processors."""

import collections
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.sampling import penalise, sample, score
from nanochat.scheduler import Request

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, 3.0, 1.5, float("-inf"), 0.2, 2.5])


def frequencies(logits, n=20_000, **fields):
    """How often each token is drawn by numbers spread evenly over [0, 1): its probability, within 1/n."""
    uniform = [(i + 0.5) / n for i in range(n)]
    drawn = sample(logits.expand(n, -1), [Request([0], **fields)] * n, uniform)
    return torch.bincount(drawn, minlength=len(logits)) / n


@pytest.mark.parametrize("top_k", [None, 0, 1, 3, 10, 1000])
def test_sampling_follows_the_distribution(top_k):
    kept = LOGITS.topk(min(top_k or 10, 10)).indices
    expected = torch.zeros(10)
    expected[kept] = (LOGITS[kept] / 0.7).softmax(-1)
    assert (frequencies(LOGITS, temperature=0.7, top_k=top_k) - expected).abs().max() < 2e-4


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    V=st.sampled_from([8, 40, 700]),
    temperature=st.sampled_from([0.2, 0.7, 1.0, 1.9]),
    top_k=st.sampled_from([None, 1, 2, 5, 30, 600]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.05, 0.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.2, 1.0]),
    repetition=st.sampled_from([1.0, 1.3, 0.7]),
)
def test_limits_are_those_of_transformers(seed, V, temperature, top_k, top_p, min_p, repetition):
    """The same processors in the order in which `generate` applies them, on one row; then the same draw."""
    processors = pytest.importorskip("transformers.generation.logits_process")
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(V, generator=generator) * 2
    tokens = torch.randint(V, (5,), generator=generator).tolist()
    chain = [processors.RepetitionPenaltyLogitsProcessor(repetition), processors.TemperatureLogitsWarper(temperature)]
    chain += [processors.TopKLogitsWarper(top_k)] if top_k else []
    chain += [processors.TopPLogitsWarper(top_p)] if top_p < 1 else []
    chain += [processors.MinPLogitsWarper(min_p)] if min_p else []
    scores = logits[None].clone()
    for each in chain:
        scores = each(torch.tensor([tokens]), scores)
    fields = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    request = Request(tokens[:3], output=tokens[3:], repetition_penalty=repetition, **fields)
    n = 1000
    drawn = sample(logits.expand(n, -1), [request] * n, [(i + 0.5) / n for i in range(n)])
    assert (torch.bincount(drawn, minlength=V) / n - scores[0].softmax(-1)).abs().max() < 1.5 / n
    assert scores[0, drawn].isfinite().all()


def test_presence_and_frequency_penalties_are_openais():
    prompt, output, bias = [1, 1, 2], [3, 3, 3, 4], {5: 2.5, 3: -1.0}
    request = Request(prompt, output=output, presence_penalty=0.5, frequency_penalty=0.25, logit_bias=bias)
    counts = collections.Counter(output)
    expected = [
        float(LOGITS[j]) - counts[j] * 0.25 - (counts[j] > 0) * 0.5 + bias.get(j, 0.0) for j in range(len(LOGITS))
    ]
    logits = LOGITS.expand(3, -1).contiguous()
    torch.testing.assert_close(penalise(logits, [Request([1]), request, Request([1])])[1], torch.tensor(expected))
    assert torch.equal(logits, LOGITS.expand(3, -1))  # the model's own logits stay as they are
    assert frequencies(LOGITS, logit_bias={2: 100.0})[2] == 1.0
    assert sample(LOGITS[None], [Request([1], temperature=0, logit_bias={5: -100, 9: -100})], [0.0]).item() == 0


def test_rows_are_sampled_by_their_own_settings():
    """Every row as if it were alone, bit by bit, whatever the others ask for."""
    logits = torch.randn(64, 500, generator=torch.Generator().manual_seed(0))
    requests = [
        Request(
            [i],
            output=[i, 2 * i],
            temperature=0.0 if i % 3 == 0 else 0.3 * (i % 5 + 1),
            top_k=[None, 0, 1, 2, 7, 49, 500, 999][i % 8],
            top_p=[1.0, 0.9, 0.3][i % 3],
            min_p=[0.0, 0.0, 0.05][i % 3],
            repetition_penalty=[1.0, 1.2][i % 2],
            frequency_penalty=[0.0, 0.1, 0.0, 0.0][i % 4],
            logit_bias={7: 3.0} if i % 6 == 0 else {},
        )
        for i in range(64)
    ]
    uniform = torch.rand(64, generator=torch.Generator().manual_seed(1)).tolist()
    together = sample(logits, requests, uniform).tolist()
    alone = [sample(logits[i : i + 1], requests[i : i + 1], uniform[i : i + 1]).item() for i in range(64)]
    assert together == alone
    plain = [Request([0], temperature=t, top_k=k) for t, k in ((0, None), (1.0, 1), (0, 5))]
    assert sample(logits[:3], plain, [0.9] * 3).tolist() == logits[:3].argmax(-1).tolist()


def test_extreme_draws_stay_within_the_possible_tokens():
    logits = torch.full((4, 1000), float("-inf"))
    logits[:, 17], logits[:, 500] = 0.0, -1.0
    settings = [(1e-30, None), (1.0, 2), (2.0, 0), (1e30, 2000)]
    requests = [Request([0], temperature=t, top_k=k) for t, k in settings]
    assert sample(logits, requests, [1 - 2**-53, 1 - 2**-53, 0.0, 0.9999999]).tolist() == [17, 500, 17, 500]


def test_logprobs_are_the_models_own():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    requests = [Request([1], logprobs=5, temperature=0.1, logit_bias={3: 50}), Request([1]), Request([1], logprobs=0)]
    first, none, last = score(logits, requests, [3, 4, 5])
    expected = logits.log_softmax(-1)
    assert none is None and last.top == {} and math.isclose(last.logprob, expected[2, 5], rel_tol=1e-5)
    top = expected[0].topk(5)
    assert first.token == 3 and list(first.top) == top.indices.tolist()
    assert first.logprob == pytest.approx(expected[0, 3].item()) and list(first.top.values()) == pytest.approx(
        top.values.tolist()
    )


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 1.1},
        {"top_p": -0.1},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"presence_penalty": math.inf},
        {"logit_bias": {3: math.nan}},
        {"logit_bias": {3: 1000}},
        {"logprobs": -1},
        {"stop": "text"},
        {"stop": [""]},
    ],
)
def test_settings_that_make_no_sense_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Request([1], **bad)
