"""Which kernel computes a product: by rows, size and columns, as measured once.

    rows   1                 gemv, with the norm in front and what follows behind; skinny, with the
                             same, for small matrices
           2 … 8             skinny
           16                skinny up to the size of an 8B model's qkv matrix
           32                skinny for the smallest
           else, up to 64    split_k, with what follows
           more              torch's library

The built-in rules are those of one measurement (benchmarks/RESULTS.md). `tuning.measure` finds the
fastest for the matrices of one model on the GPU at hand; a table on disk takes its findings from
one start to the next and wins over the rules where it has an entry.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pagedserve.kernels.capability import has_small_memory

log = logging.getLogger("pagedserve")

FORMAT = 2
GEMV_ROWS, SPLIT_ROWS = 1, 64
# Rows → the largest matrix for which `skinny` was the fastest; at 1 row a gemv is, from there on.
SKINNY_WEIGHTS = {1: 8 << 20, 2: 1 << 62, 4: 1 << 62, 8: 1 << 62, 16: 32 << 20, 32: 8 << 20}
SHORT = 2048  # columns; longer rows take more registers than there are for all of K at once
FEW_OUTPUTS = 4096
BLOCK_N, BLOCK_K = 64, 128  # of split_k
# Of a block, by GPU.
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}


@dataclass(frozen=True, slots=True)
class Gemv:
    """`gemv.gemv` and its blocks."""

    block_n: int
    block_k: int
    num_warps: int
    kind: Literal["gemv"] = "gemv"


@dataclass(frozen=True, slots=True)
class SplitK:
    """`split_k.split_k`, its blocks and shares."""

    parts: int
    block_n: int = 64
    block_k: int = 128
    num_warps: int = 4
    num_stages: int = 5
    early: bool = False
    kind: Literal["split_k"] = "split_k"


@dataclass(frozen=True, slots=True)
class Skinny:
    """`skinny.skinny` and its blocks."""

    lines: int = 16
    block_k: int = 128
    num_warps: int = 8
    ahead: int = 1
    kind: Literal["skinny"] = "skinny"


@dataclass(frozen=True, slots=True)
class Library:
    """torch's own product, and kernels for what was to be fused."""

    kind: Literal["library"] = "library"


Choice = Gemv | Skinny | SplitK | Library
KINDS: dict[str, type[Gemv] | type[Skinny] | type[SplitK] | type[Library]] = {
    "gemv": Gemv,
    "skinny": Skinny,
    "split_k": SplitK,
    "library": Library,
}


@dataclass(frozen=True, slots=True)
class Product:
    """x [rows, columns] · W [size, columns]ᵀ; `gated`: W has gate's `size` rows, then up's.

    `rows` is the bucket that the table is kept by: the next power of two.
    """

    rows: int
    size: int
    columns: int
    gated: bool = False

    @property
    def weights(self) -> int:
        """Numbers of W."""
        return self.size * self.columns * (2 if self.gated else 1)

    @property
    def key(self) -> str:
        """Its name in a table."""
        return f"{self.rows}x{self.size}x{self.columns}{'g' if self.gated else ''}"


@dataclass(slots=True)
class Table:
    """Findings by `Product.key`, of one GPU: multiprocessors, and 90 for sm_90."""

    processors: int
    capability: int
    findings: dict[str, Choice] = field(default_factory=dict)

    def choose(self, product: Product) -> Choice:
        """What was found for it, or what the rules say."""
        return self.findings.get(product.key) or by_rule(product, self.processors, self.capability)


def by_rule(product: Product, processors: int, capability: int) -> Choice:
    """Without a measurement of this very product."""
    rows = product.rows
    if product.columns % 8 or rows > SPLIT_ROWS:
        return Library()
    if product.weights <= SKINNY_WEIGHTS.get(rows, 0) and (rows < 32 or product.columns <= SHORT):
        return skinny_blocks(product)
    if rows <= GEMV_ROWS:
        return gemv_blocks(product)
    return split_blocks(product, processors, capability)


def skinny_blocks(product: Product) -> Skinny:
    """All of K on its way at once where it is short, else few registers and so many programs."""
    rows, columns = max(8, product.rows), product.columns
    warps = 4 if columns < SHORT else 8
    steps = -(-columns // (128 * warps))
    if columns < SHORT:
        lines = 32 if product.gated and rows == 8 else 16
        return Skinny(lines, 128, warps, min(steps, 2 if rows == 8 else 1))
    if product.weights <= SKINNY_WEIGHTS[1] and steps <= 3:
        lines = 32 if rows == 8 and steps == 2 else 16
        return Skinny(lines, 128, warps, min(steps, 3 if rows == 8 else 32 // rows))
    few = product.size <= FEW_OUTPUTS
    if rows > 8:
        return Skinny(32, 64, 8, 2) if few else Skinny(16, 128, 4, 32 // rows)
    if few:
        return Skinny(16, 64, 8, min(3, columns // 2048))
    return Skinny(16, 128 if product.size <= 2 * FEW_OUTPUTS else 64, 8, 1)


def gemv_blocks(product: Product) -> Gemv:
    """Rows as long as they are, up to 64 sums a thread; fewer outputs where there are few."""
    lines = 2 if product.gated else 1
    few = product.size <= FEW_OUTPUTS and not product.gated
    longest = min(4096, product.columns)
    block_k = max(512, 1 << (longest.bit_length() - 1))
    if few and block_k >= 2048:
        return Gemv(1, block_k, 4)
    warps = min(4, block_k // 256)
    return Gemv(max(1, min(4, 64 * 32 * warps // (block_k * lines))), block_k, warps)


def split_blocks(product: Product, processors: int, capability: int) -> SplitK:
    """About a program a multiprocessor, and as many stages as its shared memory holds."""
    blocks = -(-product.size // BLOCK_N)
    waves = blocks > 2 * processors  # several programs on one, each with fewer stages
    stages = 4 if product.gated else (3 if product.rows > 32 else 4) if waves else 5
    if capability < 90 or has_small_memory(capability):
        stages = 2 if product.gated else 3
    return SplitK(shares(product, processors), num_stages=stages)


def shared_bytes(product: Product, choice: SplitK) -> int:
    """Shared memory of a program."""
    lines = choice.block_n * (2 if product.gated else 1)
    rows = max(16, product.rows)
    first = lines if choice.early else 0
    return 2 * choice.block_k * (choice.num_stages * (lines + rows) + first)


def shares(product: Product, processors: int) -> int:
    """Into how many K is cut: none where it is short, else four steps or more each."""
    blocks, steps = -(-product.size // BLOCK_N), -(-product.columns // BLOCK_K)
    return max(1, min(processors // blocks, steps // 4, 16)) if steps > 8 else 1


def findings(path: Path, identity: dict[str, Any]) -> dict[str, Choice]:
    """What the table at `path` holds, nothing where it is another GPU's or version's."""
    try:
        held = json.loads(path.read_text())
        if held["format"] != FORMAT or held["identity"] != identity:
            return {}
        return {key: decoded(one) for key, one in held["findings"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as reason:
        log.warning("%s is not a table of kernels and is not used: %r", path, reason)
        return {}


def save(table: Table, path: Path, identity: dict[str, Any]) -> None:
    """Written beside and moved, so that a reader finds the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = {key: asdict(one) for key, one in sorted(table.findings.items())}
    held = {"format": FORMAT, "identity": identity, "findings": found}
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(held, indent=1))
    os.replace(unfinished, path)


def decoded(one: dict[str, Any]) -> Choice:
    """A finding from JSON."""
    return KINDS[one["kind"]](**one)
