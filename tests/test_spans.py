"""Spans scored together against each scored alone, whole, in float64 after the model."""

import random

import pytest
import torch
from core_bundle import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import spans as spans_module
from nanochat.spans import Score, Span, score_spans


def plain_score(model, span):
    with torch.no_grad():
        logp = model(torch.tensor([span.ids]))[0].double().log_softmax(-1)
    places = range(span.start, len(span.ids))
    hits = [logp[t - 1].argmax().item() == span.ids[t] for t in places]
    return Score(sum(logp[t - 1, span.ids[t]].item() for t in places), len(hits), bool(hits) and all(hits))


def check_scores(model, spans, max_tokens):
    for span, score in zip(spans, score_spans(model, spans, max_tokens), strict=True):
        expected = plain_score(model, span)
        assert score.logprob == pytest.approx(expected.logprob, abs=1e-4)
        assert score[1:] == expected[1:]


CACHED = tiny_model(5, 60, 2)
MODELS = {"cache": CACHED, "plain": lambda idx_BT: CACHED(idx_BT)}


@st.composite
def ragged(draw):
    """Spans of few different tokens, many of them with beginnings of others."""
    spans = []
    for _ in range(draw(st.integers(0, 9))):
        ids = draw(st.lists(st.integers(0, 4), min_size=1, max_size=24))
        if spans and draw(st.booleans()):
            other = draw(st.sampled_from(spans)).ids
            ids = (other[: draw(st.integers(0, len(other)))] + ids)[:60]
        spans.append(Span(ids, draw(st.integers(1, len(ids)))))
    return spans


@pytest.mark.parametrize("kind", MODELS)
@settings(max_examples=60, deadline=None)
@given(spans=ragged(), max_tokens=st.integers(1, 200), chunk=st.integers(1, 30), shared=st.floats(0.01, 1))
def test_spans_of_any_lengths_score_as_if_each_were_alone(kind, spans, max_tokens, chunk, shared):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spans_module, "CHUNK", chunk)
        patch.setattr(spans_module, "SHARED", shared)
        check_scores(MODELS[kind], spans, max_tokens)


def test_prompts_of_more_than_a_chunk_and_windows_score_as_if_each_were_alone():
    model, rng = tiny_model(50, 1024, 4), random.Random(0)
    assert min(model.config.windows) == 256
    head = rng.choices(range(50), k=600)
    spans = [
        Span(head[:cut] + rng.choices(range(50), k=more), cut + 1) for cut, more in ((600, 9), (600, 30), (555, 3))
    ]
    spans += [Span(rng.choices(range(50), k=k), k - 2) for k in (900, 300, 5)]
    check_scores(model, spans, 4096)
    check_scores(model, spans, 100)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.2)])
def test_every_precision_scores_near_its_own_plain_form(dtype, tolerance):
    model, rng = tiny_model(50, 128).to(dtype), random.Random(1)
    model.dtype = dtype
    spans = [Span(rng.choices(range(50), k=k), k - 4) for k in (12, 40, 41, 100)]
    for score, span in zip(score_spans(model, spans), spans):
        assert score.logprob / 4 == pytest.approx(plain_score(model, span).logprob / 4, abs=tolerance)


def test_what_is_shared_is_read_once_and_logits_are_made_for_the_rest_alone():
    model, rng = tiny_model(50, 512), random.Random(0)
    read, made = [], []
    decode = model.decode

    def spy(idx_N, *args):
        logits_RV = decode(idx_N, *args)
        read.append(len(idx_N))
        made.append(len(logits_RV))
        return logits_RV

    model.decode = spy
    spans = []
    for _ in range(8):  # rows of four options of 5 tokens
        head = rng.choices(range(50), k=400)
        spans += [Span(head + rng.choices(range(50), k=5), 400) for _ in range(4)]
    score_spans(model, spans)
    assert sum(read) == 8 * (399 + 4 * 5)  # the last token of an option is scored, not read
    assert sum(made) <= 8 * (2 + 4 * 5)
    read.clear()
    same = [Span([*head, answer], 400) for answer in range(10)]  # answers of one token
    score_spans(model, same)
    assert sum(read) == 400


def test_a_model_without_a_cache_reads_what_is_the_same_once():
    read = []

    def model(idx_BT):
        read.extend(idx_BT.tolist())
        return torch.zeros(*idx_BT.shape, 9)

    spans = [Span([1, 2, 3, last], start) for last in (4, 5, 6) for start in (2, 3)] + [Span([1, 2, 4, 4], 2)]
    scores = score_spans(model, spans)
    assert sorted(read) == [[1, 2, 3], [1, 2, 4]]
    assert [score.tokens for score in scores] == [2, 1, 2, 1, 2, 1, 2]
    assert score_spans(model, []) == [] and score_spans(model, [Span([1], 1)]) == [Score(0.0, 0, False)]
