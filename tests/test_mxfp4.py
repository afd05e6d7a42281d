"""MXFP4 against the format's definition: sign, exponent of bias 1, a bit of mantissa, a power of two per block."""

import torch

from nanochat.hf.gpt_oss import dequantize


def test_unpacking_follows_the_format():
    """Every code at every scale that fp32 holds."""
    codes = torch.arange(16)
    values = [
        (-1) ** (c >> 3) * ((c & 1) / 2 if c & 6 == 0 else (1 + (c & 1) / 2) * 2 ** ((c >> 1 & 3) - 1)) for c in codes
    ]
    low, high = torch.meshgrid(codes, codes, indexing="ij")
    blocks = (low + 16 * high).to(torch.uint8).view(1, 16, 16).expand(255, 16, 16)
    scales = torch.arange(255, dtype=torch.uint8).view(255, 1).expand(255, 16)
    unpacked = dequantize(blocks, scales, torch.float64).view(255, 16, 16, 2)
    expected = torch.tensor([[[values[a], values[b]] for b in range(16)] for a in range(16)], dtype=torch.float64)
    power = 2.0 ** (torch.arange(255, dtype=torch.float64) - 127)
    inside = slice(2, 252)  # 6 times the largest powers, and halves of the smallest, leave fp32
    assert torch.equal(unpacked[inside], (expected * power[:, None, None, None])[inside])
