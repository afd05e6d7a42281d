"""The cache against the full forward, and against a dictionary of what was written. Rings, limits, known beginnings."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_model import random_model

from nanochat.cache_batch import CacheBatch, Part
from nanochat.kv_cache import BLOCK, ROUND, KVCache, PrefixCache
from nanochat.language_model import LayerNeed
from nanochat.packed import prepack


def read(model, cache, idx_BT, at, counts):
    """Logits of the next tokens of each row, `counts` of them, flat: those from `at` on."""
    parts = [Part(row, 1, n, start + n) for row, (start, n) in enumerate(zip(at, counts, strict=True)) if n]
    places = [(row, at[row] + t) for row, n in enumerate(counts) for t in range(n)]
    rows_N, positions_N = torch.tensor(places).unbind(1)
    previous_N = torch.where(positions_N > 0, idx_BT[rows_N, positions_N - 1], -1)
    cache.reserve(len(counts), max(part.length for part in parts))
    context = CacheBatch(cache.layers, parts, rows_N, positions_N, previous_N)
    return places, model(idx_BT[rows_N, positions_N], context=context)


SWITCHES = [
    {},
    {"window_pattern": "L", "n_kv_head": 4},
    {"window_pattern": "SL", "n_kv_head": 1},
    {"smear_channels": 0, "backout": 0.0, "value_embed_every": 0, "softcap": 0.0, "qk_scale": 1.0},
    {"value_embed_every": 1, "n_layer": 3, "vocab_size": 64},
]


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
@torch.inference_mode()
def test_cached_logits_equal_the_full_forward(switches, packed):
    """In any chunks, far past the rings' size; the rings hold a window and a chunk, and no more."""
    model = random_model(**{"sequence_len": 500, **switches})
    idx_BT = torch.randint(61, (3, 480), generator=torch.Generator().manual_seed(1))
    expected_BTV = model(idx_BT)
    reader = prepack(model) if packed else model
    cache, at = KVCache(model.cache_needs, 500, chunk=100), [0, 0, 0]
    for counts in [(100, 3, 60), (1, 1, 1), (1, 70, 0), (99, 99, 99), (100, 100, 20), (90, 97, 0)] + [(1, 1, 30)] * 10:
        places, logits_NV = read(reader, cache, idx_BT, at, counts)
        torch.testing.assert_close(logits_NV, expected_BTV[tuple(zip(*places, strict=True))], atol=1e-4, rtol=1e-4)
        at = [start + n for start, n in zip(at, counts, strict=True)]
    assert at == [401, 380, 480]
    for layer, window in zip(cache.layers, model.config.windows, strict=True):
        keys, values = layer.memory
        assert keys.size(1) == values.size(1) == (256 if window == 128 else 512)


@torch.inference_mode()
def test_packed_in_bf16_is_as_near_to_fp32_as_the_model_is():
    model, exact = random_model(dtype=torch.bfloat16), random_model()
    idx_BT = torch.randint(61, (1, 200), generator=torch.Generator().manual_seed(1))
    cache = KVCache(model.cache_needs, 384, chunk=200)
    _, logits_TV = read(prepack(model), cache, idx_BT, [0], [200])
    errors = [(each - exact(idx_BT)).square().mean().sqrt() for each in (logits_TV, model(idx_BT))]
    assert errors[0] < 1.1 * errors[1] < 0.3


@torch.inference_mode()
def test_small_queries_and_keys_are_normed_in_bf16_as_in_training():
    """QK-norm undoes any scale, and a power of two is exact in bf16: with q and k of a mean square of 1/4096 the engine
    must give what training gives for the large ones. With bf16's epsilon (.0078) it is off by 100 %."""
    model, small = random_model(dtype=torch.bfloat16), random_model(dtype=torch.bfloat16)
    for block in small.blocks:
        for matrix in (block.attn.q, block.attn.k):
            matrix.weight *= 2.0**-6
    idx_BT = torch.randint(61, (1, 200), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(False), torch.no_grad():  # another formula of RMSNorm than the engine's
        expected_TV = model(idx_BT.clone())[0]
    _, logits_TV = read(prepack(small), KVCache(small.cache_needs, 384, chunk=200), idx_BT, [0], [200])
    assert (logits_TV - expected_TV).norm() < 0.05 * expected_TV.norm()


# --- memory ---


@settings(max_examples=60, deadline=None)
@given(st.randoms(), st.sampled_from([None, 1024, 2048]), st.sampled_from([1500, 700]), st.booleans())
def test_rows_hold_what_was_written(draw, max_tokens, context, windows):
    """Against a dictionary, through growing, cutting anew, copying and moving of rows, in fp32 by bits."""
    needs = [LayerNeed(2, 3, 100 if windows else context), LayerNeed(2, 3, 700)]
    cache = KVCache(needs, context, 50, max_tokens)
    content: list[dict[int, float]] = []  # of each row, by position

    def write(row, positions):
        values = {p: draw.random() for p in positions}
        content[row].update(values)
        k_BTKD = torch.tensor([*values.values()], dtype=torch.float64)[None, :, None, None].expand(1, -1, 2, 3)
        for layer in cache.layers:
            rows_BT = torch.full((1, len(positions)), row)
            layer.write(rows_BT, layer.slots(torch.tensor([positions])), k_BTKD, -k_BTKD)

    def check(row):
        for layer in cache.layers:
            keys, values = layer.memory
            kept = [p for p in content[row] if layer.ring is None or p > max(content[row]) - layer.ring]
            slots = layer.slots(torch.tensor(kept))
            expected = torch.tensor([content[row][p] for p in kept], dtype=torch.float64)
            assert torch.equal(keys[row, slots, 1, 2], expected) and torch.equal(values[row, slots, 0, 1], -expected)

    for _ in range(12):
        sizes = [max(row) + 1 for row in content]
        action = draw.choice(["new", "grow", "grow", "fork", "drop"])
        if action == "new" and cache.fits([*sizes, n := draw.randrange(1, 200)]):
            content.append({})
            cache.reserve(len(content), max([*sizes, n]))
            write(len(content) - 1, list(range(n)))
        elif action == "grow" and content:
            row, n = draw.randrange(len(content)), draw.randrange(1, 50)
            sizes[row] = min(sizes[row] + n, context)
            new = list(range(max(content[row]) + 1, sizes[row]))
            if new and cache.fits(sizes):
                cache.reserve(len(content), max(sizes))
                write(row, new)
        elif action == "fork" and content:
            row = draw.randrange(len(content))
            if cache.fits([*sizes, sizes[row]]):
                cache.reserve(len(content) + 1, max(sizes))
                cache.copy_row(row, len(content), sizes[row])
                content.append(dict(content[row]))
        elif action == "drop" and content:
            row = draw.randrange(len(content))
            last = content.pop()
            if row < len(content):
                cache.copy_row(len(content), row, max(last) + 1)
                content[row] = last
        for row in range(len(content)):
            check(row)
        assert max_tokens is None or cache.n_rows * cache.n_slots <= max_tokens
        assert cache.n_slots <= context + 2 * ROUND


def test_truncating_needs_what_the_window_shows():
    cache = KVCache([LayerNeed(1, 2, 128), LayerNeed(1, 2, 2048)], 2048, chunk=100)
    assert [layer.ring for layer in cache.layers] == [256, None]
    assert cache.can_truncate(1000, 872) and not cache.can_truncate(1000, 871)
    assert KVCache([LayerNeed(1, 2, 2048)], 2048).can_truncate(1000, 1)


# --- known beginnings ---


def filled(tokens, n_rows=4, windows=(2048, 2048)):
    """A cache whose row 0 has read `tokens`: a position's keys are its token."""
    cache = KVCache([LayerNeed(1, 2, window) for window in windows], 2048, chunk=64)
    cache.reserve(n_rows, max(len(tokens), 1))
    fill(cache, 0, tokens, range(len(tokens)))
    return cache


def fill(cache, row, tokens, positions):
    k_BTKD = torch.tensor([tokens[p] for p in positions]).float()[None, :, None, None].expand(1, -1, 1, 2)
    cache.reserve(row + 1, max(positions, default=0) + 1)
    for layer in cache.layers:
        slots_1T = layer.slots(torch.tensor([list(positions)], dtype=torch.int64))
        layer.write(torch.full_like(slots_1T, row), slots_1T, k_BTKD, -k_BTKD)


def row_tokens(cache, row, layer, positions):
    slots = cache.layers[layer].slots(torch.tensor(list(positions), dtype=torch.int64))
    keys, values = cache.layers[layer].memory
    assert torch.equal(keys[row, slots], -values[row, slots])
    return keys[row, slots, 0, 0].int().tolist()


def test_the_longest_known_beginning_is_loaded():
    draw = random.Random(0)
    tokens = draw.choices(range(5), k=100)
    cache = filled(tokens)
    known = PrefixCache(cache.layers, 10 * BLOCK)
    known.save(0, tokens, [])
    for common, limit in ((100, 99), (100, 100), (50, 99), (15, 99), (16, 99), (100, 31), (100, 32), (0, 99)):
        asked = [*tokens[:common], *(9 for _ in range(100 - common))]
        n = BLOCK * len(known.load(2, asked[:limit]))
        assert n == min(common, limit) // BLOCK * BLOCK
        assert all(row_tokens(cache, 2, layer, range(n)) == tokens[:n] for layer in range(2))
    known.clear()
    assert known.load(2, tokens[:99]) == []


def test_a_beginning_can_be_taken_up_where_a_ring_was_overwritten():
    """Read in chunks and saved after each, as the engine does; in the end the ring holds the last positions alone."""
    tokens = random.Random(1).choices(range(100), k=900)
    cache, chain = filled([], windows=(100, 2048)), []
    known = PrefixCache(cache.layers, 2000)
    for at in range(0, 900, 60):
        fill(cache, 0, tokens, range(at, min(at + 60, 900)))
        known.save(0, tokens[: at + 60], chain)
    for n in (16, 160, 320, 880):
        assert BLOCK * len(known.load(3, tokens[:n])) == n
        assert row_tokens(cache, 3, 0, range(max(0, n - 100), n)) == tokens[max(0, n - 100) : n]
        assert row_tokens(cache, 3, 1, range(n)) == tokens[:n]


def test_what_was_not_used_for_longest_is_forgotten_from_its_end():
    rows = [[i] * 64 for i in range(4)]
    cache = filled(rows[0])
    known = PrefixCache(cache.layers, 12 * BLOCK)
    for i, tokens in enumerate(rows):
        if i == 3:
            known.load(1, rows[0])  # used again: the second is the oldest now
        fill(cache, 0, tokens, range(64))
        known.save(0, tokens, [])
    assert [len(known.load(1, tokens)) for tokens in rows] == [4, 0, 4, 4]
    fill(cache, 0, [7] * 32, range(32))
    known.save(0, [7] * 32, [])
    assert [len(known.load(1, tokens)) for tokens in rows] == [2, 0, 4, 4]
    assert row_tokens(cache, 1, 0, range(64)) == rows[3]
    assert PrefixCache(cache.layers, 0).load(1, rows[0]) == []
    PrefixCache(cache.layers, 0).save(0, rows[0], [])


def test_a_row_longer_than_all_that_can_be_known():
    tokens = list(range(160))
    cache, chain = filled(tokens), []
    known = PrefixCache(cache.layers, 4 * BLOCK)
    known.save(0, tokens, chain)
    n = BLOCK * len(known.load(1, tokens))
    assert n == 4 * BLOCK and row_tokens(cache, 1, 0, range(n)) == tokens[:n]
    known.save(0, tokens, chain)  # nothing more has room
    fill(cache, 0, [5] * 64, range(64))
    known.save(0, [5] * 64, [])
    n = BLOCK * len(known.load(1, [5] * 64))
    assert n == 64 and row_tokens(cache, 1, 1, range(64)) == [5] * 64
