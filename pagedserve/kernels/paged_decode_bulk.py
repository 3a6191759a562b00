"""Attention of one new token for many rows, in CUDA C++: `csrc/paged_decode_bulk_cuda.cu`.

The work in equal shares, as in `paged_decode`; but a block of threads takes a bin for all key/value
heads, and one warp of it keeps bulk copies of whole tiles on their way. It is made for bandwidth:
`paged_decode_cuda` is for a few rows. Means what `paged_decode` does.

A step's lists are made by the first layer of each shape, which is launched after everything before
it (`first`); the others start early, as `paged_decode_cuda` tells.

Never required, like `paged_decode_cuda`, with which it shares a library.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from pagedserve.kernels.paged_decode import Shape
from pagedserve.kernels.paged_decode_cuda import HALF, MAX_GROUP, SIZES, TILE, Native

MIN_ROWS = 64  # with fewer a row is cut into so many bins that its merge takes longest
MAX_HEADS = 8  # key/value heads of a block of threads
MIN_TILES = 4  # of a bin
RING_BYTES = 192 << 10  # of a multiprocessor: what is on its way, and what is being multiplied
MAX_FIT = 4  # blocks of threads on a multiprocessor
FIELDS = 12  # a bin
FLAGS = 3  # a bin and head
MAP_BYTES, MAP_ALIGNMENT = 128, 64  # of a CUtensorMap


@dataclass(frozen=True, slots=True)
class Tuning:
    """bins: shares of the work; stages: tiles of keys, or of values, on their way to each."""

    bins: int
    stages: int


@dataclass(frozen=True, slots=True)
class Lists:
    """Memory of a plan: see `csrc/paged_decode_bulk_cuda.cu`."""

    starts: Tensor  # int32, as bins and flags
    bins: Tensor
    flags: Tensor
    parts: Tensor  # float32, as sums
    sums: Tensor

    @classmethod
    def on(cls, device: torch.device, shape: Shape, tuning: Tuning, rows: int) -> Lists:
        """For so many rows."""
        parts = tuning.bins * 2 * shape.kv_heads
        ints = functools.partial(torch.empty, dtype=torch.int32, device=device)
        floats = functools.partial(torch.empty, dtype=torch.float32, device=device)
        return cls(
            starts=ints(rows + 1),
            bins=ints((tuning.bins, FIELDS)),
            flags=ints(tuning.bins * shape.kv_heads * FLAGS),
            parts=floats((parts, MAX_GROUP * shape.width)),
            sums=floats((parts, 2 * MAX_GROUP)),
        )

    @property
    def num_bytes(self) -> int:
        """Of all of them."""
        return sum(getattr(self, each.name).nbytes for each in fields(self))


@dataclass(frozen=True, slots=True)
class BulkPlan:
    """What the layers of one shape share in a step, and the rows that it is of."""

    shape: Shape
    tuning: Tuning
    block_tables: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    lists: Lists


class CacheMaps:
    """The bulk copies' descriptor of each layer's part of the cache: made once, it never moves."""

    def __init__(self, native: Native) -> None:
        self.native = native
        self.known: dict[tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype], CacheMap] = {}

    def of(self, kv: Tensor) -> CacheMap:
        """kv: one layer's view [num_blocks, 2, block_size, K, D]."""
        key = (kv.data_ptr(), tuple(kv.shape), kv.stride(), kv.dtype)
        found = self.known.get(key)
        if found is None:
            found = self.known[key] = CacheMap(self.native, kv)
        return found


class CacheMap:
    """A CUtensorMap, at `address` for as long as this lives. Raises RuntimeError."""

    def __init__(self, native: Native, kv: Tensor) -> None:
        blocks, _, page, kv_heads, size = kv.shape
        self._memory = ctypes.create_string_buffer(MAP_BYTES + MAP_ALIGNMENT)
        start = ctypes.addressof(self._memory)
        self.address = -(-start // MAP_ALIGNMENT) * MAP_ALIGNMENT
        error = native.bulk_describe(
            self.address,
            kv.data_ptr(),
            blocks,
            kv.stride(0),
            kv.stride(1),
            page,
            kv_heads,
            heads_of(kv_heads),
            size,
            HALF[kv.dtype],
        )
        if error:
            raise RuntimeError(f"the cache was not described to CUDA: {native.name_of(error)}")


def heads_of(kv_heads: int) -> int:
    """Of a block of threads: as many as divide them evenly."""
    return next(n for n in range(min(kv_heads, MAX_HEADS), 0, -1) if kv_heads % n == 0)


def refusal(
    shape: Shape,
    q: Tensor,
    kv: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    softcap: float | None = None,
    slopes: Tensor | None = None,
) -> str | None:
    """None, or why this kernel cannot do it, or why another is faster."""
    if len(seq_lens) < MIN_ROWS:
        return f"{len(seq_lens)} rows are less than {MIN_ROWS}"
    if softcap or slopes is not None:
        return "scores have a softcap or biases"
    if reason := refusal_of_shape(shape, kv.dtype):
        return reason
    if q.dtype != kv.dtype:
        return f"queries of {q.dtype} and keys of {kv.dtype} are not supported"
    kinds = {t.dtype for t in (block_tables, seq_lens, query_start_loc)}
    if kinds != {torch.int32}:
        return f"tables, lengths and starts of {', '.join(sorted(map(str, kinds)))} are not int32"
    if any(n % 8 for n in (kv.stride(0), kv.stride(1))) or kv.data_ptr() % 16:
        return "keys are not aligned to 16 bytes"
    if q.stride(0) % 2 or q.data_ptr() % 4:
        return "queries are not aligned to 4 bytes"
    return None


def refusal_of_shape(shape: Shape, kv_dtype: torch.dtype) -> str | None:
    """None, or why no step's layer of this shape takes this kernel."""
    if shape.latent or shape.rest or shape.width not in SIZES:
        return "heads are not of 64 or 128 numbers"
    if shape.group > MAX_GROUP:
        return f"{shape.group} query heads share a key, more than {MAX_GROUP}"
    if kv_dtype not in HALF:
        return f"keys of {kv_dtype} are not supported"
    if shape.page < TILE or shape.page & (shape.page - 1):
        return f"blocks of {shape.page} tokens are not a power of two from {TILE} on"
    return None


def tune(native: Native, shape: Shape, processors: int) -> Tuning:
    """As many blocks of threads as a GPU of so many processors holds at once, not one more: they
    wait for each other's parts. RING_BYTES of each processor are theirs together.
    """
    heads = heads_of(shape.kv_heads)
    each = max(1, min(MAX_FIT, MAX_HEADS * max(SIZES) // (heads * shape.width)))
    stages = RING_BYTES // each // (2 * TILE * heads * shape.width)
    fit = min(each, fits(native, shape.width, heads, stages))
    return Tuning(bins=processors * fit // (shape.kv_heads // heads), stages=stages)


@functools.cache
def fits(native: Native, width: int, heads: int, stages: int) -> int:
    """Blocks of threads on a processor. Raises RuntimeError where there is no room for one."""
    found = min(int(native.bulk_fit(width, half, heads, stages)) for half in HALF.values())
    if found <= 0:
        raise RuntimeError(f"the CUDA decode kernel does not fit: {native.name_of(-found)}")
    return found


def plan_bulk(
    native: Native,
    shape: Shape,
    tuning: Tuning,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
) -> BulkPlan:
    """Share out the rows that compute one token, as `paged_decode.plan_decode` does.

    block_tables: [R, blocks], seq_lens: [R], query_start_loc: [R + 1], int32, on the GPU; nothing
    is read back, so a graph that captures this plans anew at every replay. Raises RuntimeError.
    """
    rows = len(seq_lens)
    assert block_tables.stride(1) == 1 and block_tables.shape[0] == rows
    lists = Lists.on(seq_lens.device, shape, tuning, rows)
    error = native.bulk_plan(
        seq_lens.data_ptr(),
        query_start_loc.data_ptr(),
        lists.starts.data_ptr(),
        lists.bins.data_ptr(),
        lists.flags.data_ptr(),
        rows,
        tuning.bins,
        len(lists.flags),
        shape.window,
        shape.chunk,
        MIN_TILES,
        torch.cuda.current_stream(seq_lens.device).cuda_stream,
    )
    if error:
        raise RuntimeError(f"the CUDA decode plan was not launched: {native.name_of(error)}")
    return BulkPlan(shape, tuning, block_tables, seq_lens, query_start_loc, lists)


def paged_decode_bulk(
    native: Native,
    q: Tensor,
    kv: Tensor,
    out: Tensor,
    plan: BulkPlan,
    maps: CacheMaps,
    *,
    scale: float,
    sinks: Tensor | None = None,
    first: bool = True,
) -> None:
    """Write `out` of each row that computes one token; `reference.paged_attention` says what.

    q: [T, H, D], any stride between tokens; kv: one layer's view [num_blocks, 2, block_size, K, D];
    out: [T, H, D], contiguous; sinks: [H] float32. `refusal` is None for them. first: of all
    launches with this plan. Raises RuntimeError where CUDA refuses the launch.
    """
    shape, tuning, lists = plan.shape, plan.tuning, plan.lists
    heads, size = q.shape[1:]
    assert heads == shape.kv_heads * shape.group and size == shape.width, (q.shape, shape)
    assert q.stride()[1:] == (size, 1) and out.is_contiguous() and out.shape == q.shape
    assert kv.shape[1:] == (2, shape.page, shape.kv_heads, size), kv.shape
    assert kv.stride()[2:] == (shape.kv_heads * size, size, 1)
    assert sinks is None or (sinks.dtype == torch.float32 and sinks.is_contiguous())
    error = native.bulk(
        maps.of(kv).address,
        q.data_ptr(),
        out.data_ptr(),
        plan.block_tables.data_ptr(),
        plan.seq_lens.data_ptr(),
        plan.query_start_loc.data_ptr(),
        lists.starts.data_ptr(),
        lists.bins.data_ptr(),
        lists.flags.data_ptr(),
        lists.parts.data_ptr(),
        lists.sums.data_ptr(),
        None if sinks is None else sinks.data_ptr(),
        q.stride(0),
        plan.block_tables.stride(0),
        len(plan.seq_lens),
        plan.block_tables.shape[1],
        shape.kv_heads,
        shape.group,
        heads_of(shape.kv_heads),
        size,
        HALF[q.dtype],
        (shape.page // TILE).bit_length() - 1,
        shape.window,
        shape.chunk,
        scale,
        tuning.bins,
        tuning.stages,
        not first,
        not first,
        torch.cuda.current_stream(q.device).cuda_stream,
    )
    if error:
        raise RuntimeError(f"the CUDA decode kernel was not launched: {native.name_of(error)}")
