"""What a kernel looks like when it is compiled ahead of time: its variants, as data.

Each module with Triton kernels has a list `AOT` of these. `.ci/aot_triton.py` compiles them for the
GPUs we name, without one, and fails where registers spill or an instruction is missing that the
kernel was written for. No triton here: the list says what, the script knows how.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Variant:
    """One compilation of `kernel`, a `triton.jit` (or, with `gluon`, a `gluon.jit`) function.

    types       argument → Triton's name of its type ("*bf16", "i32", "fp32"); None is an absent
                pointer. Arguments in `constants` need none
    constants   constexpr arguments
    unaligned   pointers and integers that are not known to be multiples of 16
    sass        instructions that must be there ("HGMMA")
    stack       bytes a thread that may spill; twice as many on GPUs older than 90
    capability  the oldest GPU it is meant for; kernels for 90 are not compiled for older ones
    newest      the newest, if newer ones get other constants
    """

    label: str
    kernel: Any
    types: dict[str, str | None]
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    unaligned: tuple[str, ...] = ()
    sass: tuple[str, ...] = ()
    capability: int = 80
    newest: int | None = None
    gluon: bool = False
    maxnreg: int | None = None
    stack: int = 0


def older(variant: Variant) -> Variant:
    """The same for GPUs before sm_90: without dependent launch, no instruction asked for."""
    return replace(
        variant,
        label=f"{variant.label}, older",
        constants={**variant.constants, "PDL": False},
        sass=(),
        capability=80,
    )
