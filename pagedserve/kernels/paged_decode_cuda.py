"""Attention of one new token for a few rows, in CUDA C++: `csrc/paged_decode_cuda.cu`.

A cluster of blocks computes one key/value head of one row and merges in its own shared memory, so
there is nothing to plan and no counter to reset. It is made for latency: `paged_decode`, in equal
shares, is for more rows. Means what `paged_decode` does.

Its blocks start while the kernels in front of them run, and read lengths, tables and all tokens but
the newest before those are done. A step's inputs must then be complete when any layer's launch
starts, which dependent launches alone do not promise: one can start while several before it run. So
a step's first layer is launched without (`first`), after everything before it.

Never required. It needs a GPU of capability 9.0 and a library that nvcc made (`extension`): by
`pagedserve build-kernels`, or behind a start that found none, which the next one uses.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pagedserve import config
from pagedserve.kernels import extension

if TYPE_CHECKING:
    from pagedserve.kernels.paged_decode import Shape

log = logging.getLogger("pagedserve")

CAPABILITY = (9, 0)
MAX_ROWS = 8
MAX_GROUP = 8
MAX_CLUSTER = 16
TILE = 16  # tokens
SIZES = (64, 128)  # numbers of a head
HALF = {torch.bfloat16: 0, torch.float16: 1}
MAX_TOKEN = 1 << 27  # numbers from one token to the next: the kernel counts a block's in 32 bits

P, L, N, F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
ARGUMENTS: list[Any] = [*[P] * 8, *[L] * 3, *[N] * 9, F, F, *[N] * 4, P]
BULK_ARGUMENTS: list[Any] = [*[P] * 12, *[L] * 2, *[N] * 10, F, *[N] * 4, P]


@dataclass(frozen=True, slots=True)
class Tuning:
    """cluster: blocks of threads a row and key/value head; stages: tiles that a warp holds."""

    cluster: int
    stages: int


class Native:
    """The loaded library, ready on the current device. Raises OSError where it does not work.

    paged_decode: see this module; bulk…: see `paged_decode_bulk`.
    """

    def __init__(self, path: str):
        library = ctypes.CDLL(path)

        def function(name: str, arguments: list[Any], result: Any = N) -> Any:
            found = library[name]
            found.argtypes, found.restype = arguments, result
            return found

        self.error_name = function("cuda_error_name", [N], ctypes.c_char_p)
        self.paged_decode = function("paged_decode", ARGUMENTS)
        self.bulk = function("paged_decode_bulk", BULK_ARGUMENTS)
        self.bulk_describe = function("paged_decode_bulk_describe", [P, P, L, L, L, *[N] * 5])
        self.bulk_fit = function("paged_decode_bulk_fit", [N] * 4)
        self.bulk_plan = function("paged_decode_bulk_plan", [*[P] * 5, *[N] * 6, P])
        for name in ("paged_decode_prepare", "paged_decode_bulk_prepare"):
            if error := function(name, [])():
                raise OSError(f"{path}: {self.name_of(error)}")

    def name_of(self, error: int) -> str:
        """CUDA's name of an error."""
        return str(self.error_name(error).decode())


@functools.cache
def load() -> Native | None:
    """The kernels where they are built already, for the current device; None where they are not."""
    if not config.cuda_kernels_wanted():
        return None
    try:
        path = extension.find(extension.CUDA, config.kernel_directories())
        if path is None:
            log.info("no CUDA kernels yet, Triton's serve; `pagedserve build-kernels` makes them")
            return None
        return Native(str(path))
    except (extension.Unavailable, OSError) as reason:
        log.info("no CUDA kernels, Triton's serve: %s", reason)
        return None


def build_behind() -> threading.Thread | None:
    """Have the kernels compiled where they are missing and nvcc is there; the thread that does."""
    recipe, directories = extension.CUDA, config.kernel_directories()
    if not config.cuda_kernels_wanted():
        return None
    try:
        extension.find_compiler(recipe)
        if extension.find(recipe, directories):
            return None
    except (extension.Unavailable, OSError) as reason:
        log.debug("%s are not compiled: %s", recipe.name, reason)
        return None

    def build() -> None:
        try:
            extension.shared_library(recipe, directories)
        except (extension.Unavailable, OSError) as reason:
            log.info("no CUDA kernels, Triton's serve: %s", reason)

    thread = threading.Thread(target=build, name="build CUDA kernels", daemon=True)
    thread.start()
    return thread


def refusal(
    shape: Shape, q: Tensor, kv: Tensor, block_tables: Tensor, seq_lens: Tensor
) -> str | None:
    """None, or why this kernel cannot do it. That each row computes one token, the caller knows."""
    if len(seq_lens) > MAX_ROWS:
        return f"{len(seq_lens)} rows are more than {MAX_ROWS}"
    if shape.latent or shape.rest or shape.width not in SIZES:
        return "heads are not of 64 or 128 numbers"
    if shape.group > MAX_GROUP:
        return f"{shape.group} query heads share a key, more than {MAX_GROUP}"
    if kv.dtype not in HALF or q.dtype != kv.dtype:
        return f"queries of {q.dtype} and keys of {kv.dtype} are not supported"
    if shape.page < TILE or shape.page & (shape.page - 1):
        return f"blocks of {shape.page} tokens are not a power of two from {TILE} on"
    if block_tables.dtype != torch.int32 or seq_lens.dtype != torch.int32:
        return f"tables of {block_tables.dtype} and lengths of {seq_lens.dtype} are not int32"
    if shape.page * shape.kv_heads * shape.width >= MAX_TOKEN:
        return "a block is too large"
    strides = (q.stride(0), kv.stride(0), kv.stride(1))
    if any(n % 8 for n in strides) or q.data_ptr() % 16 or kv.data_ptr() % 16:
        return "queries or keys are not aligned to 16 bytes"
    return None


def tune(shape: Shape, rows: int, processors: int) -> Tuning:
    """As many blocks a row as keep about four on a processor; two stages where it has but one.

    Lengths are not known where a graph is captured. Fewer blocks a row would be faster for many
    rows of equal length, and much slower where one is long.
    """
    cluster = MAX_CLUSTER
    while cluster > 1 and rows * shape.kv_heads * cluster > 4 * processors:
        cluster //= 2
    return Tuning(cluster, stages=2 if rows * shape.kv_heads * cluster <= processors else 1)


def paged_decode_cuda(
    native: Native,
    q: Tensor,
    kv: Tensor,
    out: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    shape: Shape,
    tuning: Tuning,
    *,
    scale: float,
    softcap: float | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    first: bool = True,
) -> None:
    """Write `out` of rows that compute one token each; `reference.paged_attention` says what.

    q: [R, H, D], any stride between rows; kv: one layer's view [num_blocks, 2, block_size, K, D];
    out: [R, H, D], contiguous; block_tables: [R, blocks]; seq_lens: [R]; slopes, sinks: [H]
    float32. `refusal` is None for them. first: of all launches of this function in a step; others
    may read what is older than the step's layers before the kernels in front of them are done.
    Raises RuntimeError where CUDA refuses the launch.
    """
    rows, heads, size = q.shape
    assert heads == shape.kv_heads * shape.group and size == shape.width, (q.shape, shape)
    assert q.stride()[1:] == (size, 1) and out.is_contiguous() and out.shape == q.shape
    assert kv.shape[1:] == (2, shape.page, shape.kv_heads, size), kv.shape
    assert kv.stride()[2:] == (shape.kv_heads * size, size, 1)
    assert block_tables.stride(1) == 1 and block_tables.shape[0] == len(seq_lens) == rows
    for t in (slopes, sinks):
        assert t is None or (t.dtype == torch.float32 and t.shape == (heads,) and t.stride(0) == 1)
    error = native.paged_decode(
        q.data_ptr(),
        kv.data_ptr(),
        kv.data_ptr() + kv.stride(1) * kv.element_size(),
        out.data_ptr(),
        block_tables.data_ptr(),
        seq_lens.data_ptr(),
        None if slopes is None else slopes.data_ptr(),
        None if sinks is None else sinks.data_ptr(),
        q.stride(0),
        block_tables.stride(0),
        kv.stride(0),
        rows,
        block_tables.shape[1],
        shape.kv_heads,
        shape.group,
        size,
        HALF[q.dtype],
        (shape.page // TILE).bit_length() - 1,
        shape.window,
        shape.chunk,
        scale,
        softcap or 0.0,
        tuning.cluster,
        tuning.stages,
        not first,
        not first,
        torch.cuda.current_stream(q.device).cuda_stream,
    )
    if error:
        raise RuntimeError(f"the CUDA decode kernel was not launched: {native.name_of(error)}")
