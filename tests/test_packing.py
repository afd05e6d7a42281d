"""Best-fit packing keeps its promises on any lengths."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.packing import plan_rows


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 80), max_size=60), st.integers(2, 33), st.integers(0, 2**32), st.booleans())
def test_packing_keeps_every_token_once(lengths, row_tokens, seed, split):
    if not split:
        lengths = [min(length, row_tokens) for length in lengths]
    rows = plan_rows(lengths, row_tokens, split, seed)
    pieces = sorted(itertools.chain.from_iterable(rows))
    for document, length in enumerate(lengths):
        end = 0
        for _, offset, count in (piece for piece in pieces if piece[0] == document and piece[2]):
            assert offset == end, "the pieces of a document lie end to end"
            end += count
        assert end == length
    fill = [sum(length + split for _, _, length in row) for row in rows]
    assert all(0 < tokens <= row_tokens for tokens in fill)
    if split:
        assert all(tokens >= row_tokens - 1 for tokens in fill[:-1]), "only the last row has a gap larger than a BOS"
    else:
        assert len(pieces) == sum(length > 0 for length in lengths), "conversations stay whole"


def test_the_example_of_the_docstring():
    assert plan_rows([5, 3, 2], row_tokens=6, split=True) == [[(0, 0, 5)], [(1, 0, 3), (2, 0, 1)], [(2, 1, 1)]]


def test_packing_is_a_function_of_its_arguments():
    lengths = np.random.default_rng(0).integers(1, 200, 500)
    plans = [plan_rows(lengths, 65, True, seed) for seed in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]


def test_whole_documents_are_packed_close_to_the_bound():
    lengths = np.random.default_rng(0).integers(5, 65, 5000)
    rows = len(plan_rows(lengths, 65, split=False))
    assert rows <= 1.03 * lengths.sum() / 65


def test_documents_far_longer_than_a_row_do_not_starve_the_others():
    rows = plan_rows([100_000, 3, 100_000, 2], 17, split=True)
    assert {document for row in rows for document, _, _ in row} == {0, 1, 2, 3}
    assert len(rows) == pytest.approx(200_005 / 16, rel=0.001)


def test_cutting_stays_rare_and_constant_over_50_000_rows():
    """Cropping the shortest document would leave ever longer ones, and the rate would climb (1 % to 17 %)."""
    lengths = np.clip(np.random.default_rng(0).lognormal(4.6, 1.0, 60_000), 1, 3000).astype(int)
    rows = plan_rows(lengths, 129, split=True)
    assert len(rows) >= 50_000
    begin_inside = sum(offset > 0 for row in rows for _, offset, _ in row)
    unavoidable = np.sum(np.ceil(lengths / 128) - 1)
    assert begin_inside < 1.1 * unavoidable


def test_conversation_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="34 tokens, a row 33"):
        plan_rows([3, 34], 33, split=False)
