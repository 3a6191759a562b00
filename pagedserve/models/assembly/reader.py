"""Reads a checkpoint by roles: what a spec calls a thing, and how it is stored, to a tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pagedserve.device import Device
from pagedserve.kernels.ops import Ops
from pagedserve.layers.linear import Linear
from pagedserve.layers.norm import BareNorm, Normalize, normalize
from pagedserve.models.weights import Source
from pagedserve.spec import DecoderSpec, Norm


@dataclass(frozen=True, slots=True)
class Rows:
    """Part of a stored matrix: rows `index` ([n] int64, None for all) of the tensor of `role`."""

    role: str
    count: int
    index: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Reader:
    """What all rooms of the assembly share. Roles are those of `DecoderSpec.names`."""

    spec: DecoderSpec
    source: Source
    device: Device
    dtype: torch.dtype
    numbers: Mapping[str, int] = field(default_factory=dict)

    def at(self, **numbers: int) -> Reader:
        """With the numbers that some roles' names have in them besides the layer's."""
        return replace(self, numbers=numbers)

    @property
    def ops(self) -> Ops:
        return self.device.ops(self.dtype)

    def name(self, role: str, i: int | None = None) -> str:
        """The checkpoint's name, without its part."""
        prefix = "" if i is None else self.spec.names["layer"].format(i=i)
        return prefix + self.spec.names[role].format(**self.numbers)

    def whole_name(self, role: str, i: int | None = None, part: str = "weight") -> str:
        """With its part; `part` "" for a tensor that is called by its role alone."""
        if f"{role}.{part}" in self.spec.names:
            return self.name(f"{role}.{part}", i)
        return f"{self.name(role, i)}.{part}" if part else self.name(role, i)

    def has(self, role: str, i: int | None = None, part: str = "weight") -> bool:
        """Whether the checkpoint holds it, demanded or not."""
        return role in self.spec.names and self.source.has(self.whole_name(role, i, part))

    def has_bias(self, role: str, i: int | None = None) -> bool:
        return role in self.spec.biases or self.has(role, i, "bias")

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory on the device, to be filled."""
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device.torch)

    def tensor(
        self,
        role: str,
        shape: Sequence[int],
        i: int | None = None,
        *,
        part: str = "weight",
        rows: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """One tensor of its own."""
        into = self.empty(*shape, dtype=dtype)
        self.read(role, into, i, part=part, rows=rows)
        return into

    def read(
        self,
        role: str,
        into: Tensor,
        i: int | None = None,
        *,
        part: str = "weight",
        rows: Tensor | None = None,
        transposed: bool = False,
        later: bool = False,
    ) -> None:
        """Fill `into`; `later`: see `Source.read`."""
        name = self.whole_name(role, i, part)
        self.source.read(name, into, transposed=transposed, rows=rows, later=later)

    def norm(self, role: str, i: int | None = None, norm: Norm | None = None) -> Normalize | None:
        """The norm of a role over the hidden size, as the spec's; None where the role is absent."""
        if role not in self.spec.names:
            return None
        return self.norm_of(role, self.spec.hidden_size, norm or self.spec.norm, i)

    def optional_norm(
        self, role: str, size: int, norm: Norm | None, i: int | None
    ) -> Normalize | None:
        """`norm_of`, if there is such a norm."""
        return None if norm is None else self.norm_of(role, size, norm, i)

    def norm_of(
        self, role: str, size: int, norm: Norm, i: int | None, rows: Tensor | None = None
    ) -> Normalize:
        """A norm over `size` numbers."""
        if norm.bare:
            return BareNorm(norm)
        weight, bias = self.norm_weights(role, (size,), norm, i, rows)
        assert weight is not None
        return normalize(norm, weight, bias, self.ops)

    def norm_weights(
        self, role: str, shape: Sequence[int], norm: Norm, i: int | None, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Weight, with its offset, and bias; in float32 where there is an offset."""
        dtype = torch.float32 if norm.offset else None
        weight = self.tensor(role, shape, i, rows=rows, dtype=dtype)
        bias = None
        if norm.kind == "layer" and self.has_bias(role, i):
            bias = self.tensor(role, shape, i, part="bias", rows=rows)
        return (weight + norm.offset if norm.offset else weight), bias

    def linear(self, rows: Mapping[str, int], columns: int, i: int | None = None) -> Linear:
        """The matrices of several roles stacked; `rows`: how many output rows each has."""
        return self.stacked([Rows(role, count) for role, count in rows.items()], columns, i)

    def stacked(self, parts: Sequence[Rows], columns: int, i: int | None = None) -> Linear:
        """Parts of stored matrices, one below the other, with their biases."""
        weight, bias = self.matrix(parts, columns, i, later=self.device.takes_unread)
        return Linear.of(weight, bias, self.device)

    def matrix(
        self, parts: Sequence[Rows], columns: int, i: int | None = None, *, later: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The same as plain tensors: [rows, columns], and [rows] or None."""
        total = sum(part.count for part in parts)
        weight = self.empty(total, columns)
        biased = {part.role for part in parts if self.has_bias(part.role, i)}
        bias = self.empty(total).zero_() if biased else None
        start = 0
        for part in parts:
            at = slice(start, start + part.count)
            turned, rows = self.spec.transposed, part.index
            self.read(part.role, weight[at], i, rows=rows, transposed=turned, later=True)
            if bias is not None and part.role in biased:
                self.read(part.role, bias[at], i, part="bias", rows=rows, later=True)
            start += part.count
        if not later:
            self.source.settle()
        return weight, bias
