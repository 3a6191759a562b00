"""What the GPUs of a compute capability have, as far as the kernels' constants ask. No torch here.

Source: CUDA programming guide, technical specifications per compute capability. 90 is sm_90.
"""

from __future__ import annotations

SMALL = 99 << 10  # bytes of shared memory that a block of the smaller GPUs can have at most


def has_small_memory(capability: int) -> bool:
    """Whether a block has no more than SMALL: 8.6, 8.9 and 12.x, where others have 163 KiB on."""
    return capability in (86, 89) or capability // 10 == 12
