"""Best-fit packing keeps its promises on any lengths."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.token_shards import plan_rows


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 80), max_size=60), st.integers(2, 33), st.integers(0, 2**32), st.booleans())
def test_packing_keeps_every_token_once(lengths, row_tokens, seed, split):
    if not split:
        lengths = [min(length, row_tokens) for length in lengths]
    plan = plan_rows(lengths, row_tokens, split, seed)
    pieces = sorted(zip(plan.document.tolist(), plan.offset.tolist(), plan.length.tolist()))
    for document, length in enumerate(lengths):
        end = 0
        for _, offset, count in (piece for piece in pieces if piece[0] == document and piece[2]):
            assert offset == end, "the pieces of a document lie end to end"
            end += count
        assert end == length
    fill = [int(np.sum(plan.length[a:b] + split)) for a, b in plan.rows_R2]
    assert all(0 < tokens <= row_tokens for tokens in fill)
    assert sorted(i for a, b in plan.rows_R2 for i in range(a, b)) == list(range(len(plan.length)))
    if split:
        assert all(tokens >= row_tokens - 1 for tokens in fill[:-1]), "only the last row has a gap larger than a BOS"
    else:
        assert len(plan.document) == sum(length > 0 for length in lengths), "conversations stay whole"


def test_packing_is_a_function_of_its_arguments():
    lengths = np.random.default_rng(0).integers(1, 200, 500)
    documents = [plan_rows(lengths, 65, True, seed).document.tobytes() for seed in (1, 1, 2)]
    assert documents[0] == documents[1] != documents[2]


def test_whole_documents_are_packed_close_to_the_bound():
    lengths = np.random.default_rng(0).integers(5, 65, 5000)
    rows = len(plan_rows(lengths, 65, split=False).rows_R2)
    assert rows <= 1.03 * lengths.sum() / 65


def test_documents_far_longer_than_a_row_do_not_starve_the_others():
    plan = plan_rows([100_000, 3, 100_000, 2], 17, split=True)
    assert set(plan.document.tolist()) == {0, 1, 2, 3}
    assert len(plan.rows_R2) == pytest.approx(200_005 / 16, rel=0.001)


def test_cutting_stays_rare_and_constant_over_50_000_rows():
    """Cropping the shortest document would leave ever longer ones, and the rate would climb (1 % to 17 %)."""
    lengths = np.clip(np.random.default_rng(0).lognormal(4.6, 1.0, 60_000), 1, 3000).astype(int)
    plan = plan_rows(lengths, 129, split=True)
    assert len(plan.rows_R2) >= 50_000
    begins_inside = (plan.offset > 0).astype(int)
    unavoidable = np.sum(np.ceil(lengths / 128) - 1)
    assert begins_inside.sum() < 1.1 * unavoidable


def test_conversation_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="34 tokens, a row 33"):
        plan_rows([3, 34], 33, split=False)
