"""Attention to the slots of a cache. Oracle: the definition over whole rows."""

import pytest
import torch

from nanochat.attention import attend_naive
from nanochat.cached_attention import attend_fused, attend_to_slots, slot_mask


def make(S, B, H=4, K=2, D=16):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, S, heads, D, generator=generator) for heads in (H, K, K)]


def attend_at(q_BTHD, k_BSKD, v_BSKD, positions_BT, window, form):
    """Attention of queries at `positions_BT` to keys of which slot s holds position s, laid out as the cache does."""
    distance_BTS = positions_BT[:, :, None] - torch.arange(k_BSKD.size(1))
    hidden_BTS = (distance_BTS < 0) | (distance_BTS >= window)
    keys_GDS = k_BSKD.permute(0, 2, 3, 1).flatten(0, 1)
    values_GSD = v_BSKD.transpose(1, 2).flatten(0, 1)
    group = q_BTHD.size(2) // k_BSKD.size(2)
    mask_B1MS = slot_mask(hidden_BTS, group, q_BTHD.dtype)
    if form is attend_fused:  # on a GPU, for which it is, masks have no rows to spare
        mask_B1MS = mask_B1MS[:, :, : positions_BT.size(1) * group]
    return form(q_BTHD, keys_GDS, values_GSD, mask_B1MS)


@pytest.mark.parametrize("form", [attend_to_slots, attend_fused])
@pytest.mark.parametrize("window", [3, 100])
@pytest.mark.parametrize("T", [1, 3])
def test_new_tokens_attend_as_in_whole_rows(form, window, T):
    """Rows of unlike lengths in one cache of 256 slots, T new tokens each; slots not yet written hold rubbish."""
    S, lengths = 256, (3, 10, 256, 170)
    q, k, v = make(S, B=len(lengths))
    cached_k, cached_v = k.clone(), v.clone()
    for row, length in enumerate(lengths):
        cached_k[row, length:] = cached_v[row, length:] = 1e3
    positions_BT = torch.tensor([[length - T + t for t in range(T)] for length in lengths])
    q_new = torch.stack([q[row, positions] for row, positions in enumerate(positions_BT)])
    got = attend_at(q_new, cached_k, cached_v, positions_BT, window, form)
    full = attend_naive(q, k, v, window)
    for row, positions in enumerate(positions_BT):
        torch.testing.assert_close(got[row], full[row, positions], rtol=1e-5, atol=1e-5)


def test_a_query_gives_the_same_bits_in_any_company():
    """Alone, beside other queries and rows, and with more hidden slots."""
    q, k, v = make(256, B=3)
    positions_BT = torch.tensor([[90, 91, 92], [10, 11, 12], [99, 100, 101]])
    together = attend_at(q[:, :3], k, v, positions_BT, 1000, attend_to_slots)
    alone = attend_at(q[:1, 1:2], k[:1, :128], v[:1, :128], positions_BT[:1, 1:2], 1000, attend_to_slots)
    assert torch.equal(together[0, 1], alone[0, 0])


def test_a_sink_takes_its_share_as_in_the_definition():
    q, k, v = make(128, B=2)
    sinks_H = torch.tensor([-1.0, 0.0, 1.0, 3.0])
    positions_BT = torch.arange(128).expand(2, -1)
    got = attend_at(q, k, v, positions_BT, 128, lambda *inputs: attend_to_slots(*inputs, sinks_H))
    torch.testing.assert_close(got, attend_naive(q, k, v, 128, sinks_H), rtol=1e-5, atol=1e-5)
