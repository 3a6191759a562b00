"""A Gluon kernel run as Python, since Gluon has no interpreter: what it needs of the language, in
torch on the CPU.

Layouts mean nothing here, so this says what a kernel computes and what it reads and writes, not how
threads share it. A read or a write outside of its tensor fails.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pagedserve.kernels import activation


@dataclass(frozen=True)
class Pointer:
    """To the elements `at` of a tensor's memory, which is `memory` from its first element on."""

    memory: Tensor
    at: Any = 0

    @classmethod
    def to(cls, tensor: Tensor) -> Pointer:
        last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        return cls(tensor.as_strided((last + 1,), (1,)))

    @property
    def dtype(self) -> SimpleNamespace:
        return SimpleNamespace(element_ty=self.memory.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.at + offset)


@dataclass
class Shared:
    """Shared memory, NaN before it is written."""

    content: Tensor

    def store(self, value: Tensor) -> None:
        self.content.copy_(value)

    def load(self, layout: object) -> Tensor:
        return self.content.clone()

    def slice(self, start: int, length: int, dim: int) -> Shared:
        return Shared(self.content.narrow(dim, start, length))


def load(
    pointer: Pointer, mask: Tensor | None = None, other: float = 0.0, eviction_policy: str = ""
) -> Tensor:
    at = torch.as_tensor(pointer.at)
    mask = torch.ones_like(at, dtype=torch.bool) if mask is None else mask
    at, mask = torch.broadcast_tensors(at, mask)
    assert ((at >= 0) & (at < len(pointer.memory)) | ~mask).all(), "reads outside of a tensor"
    found = pointer.memory[at.clamp(0, len(pointer.memory) - 1)]
    return torch.where(mask, found, torch.tensor(other, dtype=found.dtype))


def store(pointer: Pointer, value: Tensor, mask: Tensor) -> None:
    at, value, mask = torch.broadcast_tensors(pointer.at, value, mask)
    at, value = at[mask], value[mask]
    assert ((at >= 0) & (at < len(pointer.memory))).all(), "writes outside of a tensor"
    assert len(at.unique()) == len(at), "writes an element twice"
    pointer.memory[at] = value


def either(condition: Any, a: Any, b: Any) -> Tensor:
    return torch.where(condition, torch.as_tensor(a), torch.as_tensor(b))


def smaller(a: Any, b: Any) -> Tensor:
    return torch.minimum(torch.as_tensor(a), torch.as_tensor(b))


def larger(a: Any, b: Any) -> Tensor:
    return torch.maximum(torch.as_tensor(a), torch.as_tensor(b))


def nothing(*args: object, **options: object) -> None:
    return None


def language(program: int, num_warps: int) -> SimpleNamespace:
    """`gl`, and what of `tl` Triton's own functions use, for one program."""
    return SimpleNamespace(
        arange=lambda start, end, layout: torch.arange(start, end),
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        allocate_shared_memory=lambda dtype, shape, layout: Shared(
            torch.full(shape, float("nan"), dtype=dtype)
        ),
        load=load,
        store=store,
        sum=torch.sum,
        convert_layout=lambda value, layout, assert_trivial=False: value,
        rsqrt=torch.rsqrt,
        exp=torch.exp,
        erf=torch.erf,
        where=either,
        minimum=smaller,
        maximum=larger,
        program_id=lambda axis: program,
        num_warps=lambda: num_warps,
        static_range=range,
        int64=torch.int64,
        float32=torch.float32,
        NVMMADistributedLayout=nothing,
        DotOperandLayout=nothing,
        BlockedLayout=nothing,
        SliceLayout=nothing,
        SwizzledSharedLayout=nothing,
    )


def mma(a: Tensor, b: Tensor, acc: Tensor) -> Tensor:
    return acc + a.float() @ b.float()


def launch(
    module: types.ModuleType, kernel: str, programs: int, num_warps: int
) -> Callable[..., None]:
    """A kernel of `module` and the module's functions it calls, as a function of its arguments."""

    def run(*args: object, **constants: object) -> None:
        for program in range(programs):
            gl = language(program, num_warps)
            names: dict[str, Any] = {"gl": gl, "tl": gl, "mma_v2": mma}
            names |= {"wait": nothing, "launch_dependents": nothing}
            for source in (activation, module):
                for name, value in vars(source).items():
                    if name not in names and hasattr(value, "fn"):
                        names[name] = types.FunctionType(value.fn.__code__, names, name)
            given = [Pointer.to(arg) if isinstance(arg, Tensor) else arg for arg in args]
            names[kernel](*given, **constants)

    return run
