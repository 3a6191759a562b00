"""MXFP4: 4-bit floats in blocks of 32 that share a power of two (OCP Microscaling Formats, v1.0).

blocks   [..., columns / 32, 16] uint8: two numbers a byte, the first in the low half
scales   [..., columns / 32] uint8: exponent + 127
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # sign in the highest of four bits


def dequantise(blocks: Tensor, scales: Tensor, into: Tensor) -> None:
    """Fill `into` [..., columns] with what `blocks` and `scales` hold; exact in bfloat16 and up.

    A scale of 255 stands for NaN, and gives it.
    """
    table = torch.tensor((*E2M1, *(-x for x in E2M1)), dtype=torch.float32, device=blocks.device)
    numbers = torch.stack((table[(blocks & 15).int()], table[(blocks >> 4).int()]), -1).flatten(-2)
    exponents = scales.int() - 127
    scaled = torch.ldexp(numbers, exponents.unsqueeze(-1))
    scaled = scaled.masked_fill((scales == 255).unsqueeze(-1), torch.nan)
    into.copy_(scaled.reshape(into.shape))
