"""Spans scored together against each scored alone, whole, in float64 after the model."""

import random

import pytest
import torch
from core_bundle import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import hf
from nanochat.spans import Score, Span, score_questions


def plain_score(model, span):
    with torch.no_grad():
        logp = model(torch.tensor([span.ids]))[0].double().log_softmax(-1)
    places = range(span.start, len(span.ids))
    hits = [logp[t - 1].argmax().item() == span.ids[t] for t in places]
    return Score(sum(logp[t - 1, span.ids[t]].item() for t in places), len(hits), bool(hits) and all(hits))


def disagreements(model, questions, max_tokens):
    """Spans that score otherwise than if each were alone, with both scores."""
    found = []
    for spans, scores in zip(questions, score_questions(model, questions, max_tokens), strict=True):
        for span, score in zip(spans, scores, strict=True):
            expected = plain_score(model, span)
            if score.logprob != pytest.approx(expected.logprob, abs=1e-4) or score[1:] != expected[1:]:
                found.append((span, score, expected))
    return found


MODEL = tiny_model(5, 60, 2)


@st.composite
def ragged(draw):
    """A question's spans of few different tokens, many of them with beginnings of others."""
    spans = []
    for _ in range(draw(st.integers(1, 5))):
        ids = draw(st.lists(st.integers(0, 4), min_size=1, max_size=24))
        if spans and draw(st.booleans()):
            other = draw(st.sampled_from(spans)).ids
            ids = (other[: draw(st.integers(0, len(other)))] + ids)[:60]
        spans.append(Span(ids, draw(st.integers(1, len(ids)))))
    return spans


@settings(max_examples=100, deadline=None)
@given(questions=st.lists(ragged(), max_size=5), max_tokens=st.integers(1, 200))
def test_spans_of_any_lengths_score_as_if_each_were_alone(questions, max_tokens):
    assert disagreements(MODEL, questions, max_tokens) == []


def test_long_prompts_and_windows_score_as_if_each_were_alone():
    model, rng = tiny_model(50, 1024, 4), random.Random(0)
    assert min(model.config.windows) == 256
    head = rng.choices(range(50), k=600)
    spans = [
        Span(head[:cut] + rng.choices(range(50), k=more), cut + 1) for cut, more in ((600, 9), (600, 30), (555, 3))
    ]
    others = [[Span(rng.choices(range(50), k=k), k - 2)] for k in (900, 300, 5)]
    assert disagreements(model, [spans, *others], max_tokens=4096) == []
    assert disagreements(model, [spans, *others], max_tokens=100) == []


@pytest.mark.parametrize("family", ["gpt2", "mistral", "qwen3", "gpt_oss"])
def test_every_family_scores_as_transformers_does(family, tmp_path):
    """Windows, sinks, biases and learned positions included."""
    tiny_hf = pytest.importorskip("tiny_hf")
    theirs = tiny_hf.make(family)
    model = hf.load_model(tiny_hf.save(theirs, tmp_path), "cpu", torch.float32)
    rng = random.Random(0)
    head = rng.choices(range(50), k=40)
    spans = [Span(head + rng.choices(range(50), k=k), 38) for k in (1, 4, 9)]
    for span, score in zip(spans, score_questions(model, [spans])[0], strict=True):
        expected = plain_score(lambda idx_BT: theirs(idx_BT).logits, span)
        assert score.logprob == pytest.approx(expected.logprob, abs=1e-3) and score.tokens == expected.tokens


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.2)])
def test_every_precision_scores_near_its_own_plain_form(dtype, tolerance):
    model, rng = tiny_model(50, 128).to(dtype), random.Random(1)
    model.dtype = dtype
    spans = [Span(rng.choices(range(50), k=k), k - 4) for k in (12, 40, 41, 100)]
    for (score,), span in zip(score_questions(model, [[span] for span in spans]), spans, strict=True):
        assert score.logprob / 4 == pytest.approx(plain_score(model, span).logprob / 4, abs=tolerance)


class Counted:
    """A model that notes how many tokens it reads, and for how many it makes logits."""

    def __init__(self, model):
        self.model = model
        self.device = model.device
        self.read = 0
        self.made = 0

    def __call__(self, idx_N, context, wanted_R):
        logits_RV = self.model(idx_N, context=context, wanted_R=wanted_R)
        self.read += len(idx_N)
        self.made += len(logits_RV)
        return logits_RV


def test_what_is_shared_is_read_once_and_logits_are_made_for_scored_tokens_alone():
    rng = random.Random(0)
    model = Counted(tiny_model(50, 512))
    questions = []
    for _ in range(8):  # four options of 5 tokens
        head = rng.choices(range(50), k=400)
        questions.append([Span([*head, option, *rng.choices(range(50), k=4)], 400) for option in range(4)])
    score_questions(model, questions)
    # Of the head all but the last token is shared; the last token of an option is scored, not read.
    assert model.read == 8 * (399 + 4 * 5)
    assert model.made == 8 * 4 * 5


def test_nothing_to_score():
    nothing = Span([1], 1)
    assert score_questions(MODEL, []) == []
    scores = score_questions(MODEL, [[nothing], [Span([1, 2], 1), nothing]])
    assert scores[0] == [Score(0.0, 0, False)] and scores[1][1] == Score(0.0, 0, False)
    assert scores[1][0].tokens == 1
