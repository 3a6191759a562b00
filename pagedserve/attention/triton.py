"""Attention on a GPU by our own kernels: rows of one token, and rows of several.

    rows of one token    kernels/paged_decode_cuda     few rows and nothing else, where it is built
                         kernels/paged_decode_bulk     many rows, plain cases, where it is built
                         kernels/paged_decode          equal shares of all keys
    rows of several      kernels/paged_prefill_wgmma   plain cases on GPUs of capability 9.0
                         kernels/paged_prefill         everything else

Nothing here waits for the GPU or reads from it. What a step's layers share is planned on the device
by the first layer that needs it, from the batch's tensors; so a graph that captures plan and layers
serves any lengths, and any rows: which compute one token, several or none is read on the device,
where the batch's counts on the host only say which kernels are launched at all. A batch to be
captured for mixed steps therefore has a row of each kind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from pagedserve.attention.base import Most
from pagedserve.attention.batch import Batch
from pagedserve.device import Device
from pagedserve.kernels import (
    kv_write,
    paged_decode,
    paged_decode_bulk,
    paged_decode_cuda,
    paged_prefill,
    paged_prefill_wgmma,
)
from pagedserve.kernels.paged_decode import DecodePlan, Shape
from pagedserve.kernels.paged_decode_bulk import BulkPlan
from pagedserve.kernels.paged_prefill import PrefillPlan
from pagedserve.spec import Attn

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_SIZE = 256  # numbers of a head
PREFILL_BYTES = 36  # of a plan, for each of its tiles, which have a token at least
MAX_LATENT, MAX_ROTATED = 512, 128  # numbers of a latent's values, and of its keys beyond them


@dataclass(frozen=True, slots=True)
class Processors:
    """What the kernels' constants depend on."""

    count: int
    capability: tuple[int, int]

    @classmethod
    def of(cls, device: torch.device) -> Processors:
        if device.type != "cuda":  # an outline: of the largest that there are
            return cls(132, (9, 0))
        found = torch.cuda.get_device_properties(device)
        return cls(found.multi_processor_count, (found.major, found.minor))


@dataclass(slots=True)
class TritonPlan:
    """Made as the layers come: the work of each shape, and of each tile and sight.

    started: `paged_decode_cuda` was launched in this step.
    """

    batch: Batch
    started: bool = False
    decodes: dict[Shape, DecodePlan] = field(default_factory=dict)
    bulks: dict[Shape, BulkPlan] = field(default_factory=dict)
    prefills: dict[tuple[int, int, int], PrefillPlan] = field(default_factory=dict)

    @property
    def some_decode(self) -> bool:
        return self.batch.num_decodes > 0

    @property
    def some_prefill(self) -> bool:
        return self.batch.num_decodes < len(self.batch.counts)


class TritonAttention:
    """See the module. `processors`: of the device, unless a test says otherwise.

    `native`: the kernels in CUDA C++, where there are any for this GPU.
    """

    name = "triton"
    needs_lens = False
    takes_written = True

    def __init__(
        self,
        device: Device,
        processors: Processors | None = None,
        native: paged_decode_cuda.Native | None = None,
    ):
        self.processors = processors or Processors.of(device.torch)
        self.descriptors = paged_prefill_wgmma.CacheDescriptors()
        ours = device.is_gpu and self.processors.capability == paged_decode_cuda.CAPABILITY
        self.native = native or (paged_decode_cuda.load() if ours else None)
        self.maps = paged_decode_bulk.CacheMaps(self.native) if self.native else None

    def supports(self, attn: Attn, kv_dtype: torch.dtype, block_size: int) -> str | None:
        """See `AttentionBackend`."""
        if self.processors.capability < (8, 0):
            major, minor = self.processors.capability
            return f"it needs a GPU of capability 8.0, this one has {major}.{minor}"
        if attn.heads % attn.kv_heads:
            return f"{attn.heads} query heads do not divide among {attn.kv_heads} key/value heads"
        if kv_dtype not in DTYPES:
            return f"a cache of {kv_dtype} is not supported"
        latent = attn.values_in_keys or 0
        if latent and (latent > MAX_LATENT or attn.head_dim - latent > MAX_ROTATED):
            return f"latents of {latent} and {attn.head_dim - latent} numbers are too large"
        if attn.head_dim > MAX_SIZE and (not latent or kv_dtype == torch.float32):
            return f"heads of {attn.head_dim} numbers in {kv_dtype} are too large"
        return None

    def workspace_bytes(self, attns: list[Attn], most: Most, kv_dtype: torch.dtype) -> int:
        """See `AttentionBackend`. Every shape has a plan of its own, alive for the whole step."""
        shapes = {shape_of(attn, most.block_size, kv_dtype) for attn in attns}
        count, capability = self.processors.count, self.processors.capability
        meta, blocks = torch.device("meta"), -(-(most.context + 1) // most.block_size)
        total = 0
        for shape in shapes:
            tuning = paged_decode.tune(shape, count, capability)
            plan = DecodePlan.on(meta, shape, tuning, most.rows, blocks)
            needed = sum(getattr(plan, each.name).nbytes for each in fields(plan)[2:])
            if self.native and paged_decode_bulk.refusal_of_shape(shape, kv_dtype) is None:
                bulk = paged_decode_bulk.tune(self.native, shape, count)
                lists = paged_decode_bulk.Lists.on(meta, shape, bulk, most.rows)
                needed = max(needed, lists.num_bytes)
            total += needed
            total += (most.tokens + most.rows) * PREFILL_BYTES
        return total

    def plan(self, batch: Batch) -> TritonPlan:
        """See `AttentionBackend`."""
        return TritonPlan(batch)

    def forward(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        kv: Tensor,
        plan: TritonPlan,
        attn: Attn,
        *,
        slopes: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """See `AttentionBackend`. k: None where this step's keys and values are in the cache."""
        if k is not None:
            kv_write.kv_write(kv, plan.batch.slot_mapping, k, v)
        q = kv_write.rows(q)
        out = q.new_empty((q.shape[0], attn.heads, attn.values_in_keys or attn.head_dim))
        shape = shape_of(attn, kv.shape[2], kv.dtype)
        if plan.some_decode:
            self._choose_decode(q, kv, plan, shape, attn, slopes)(
                q, kv, out, plan, shape, attn, slopes, sinks
            )
        if plan.some_prefill:
            self._prefill(q, kv, out, plan, shape, attn, slopes, sinks)
        return out

    def _choose_decode(
        self,
        q: Tensor,
        kv: Tensor,
        plan: TritonPlan,
        shape: Shape,
        attn: Attn,
        slopes: Tensor | None,
    ) -> Callable[..., None]:
        """The rule of who decodes; benchmarks/RESULTS.md has the figures that it follows."""
        batch = plan.batch
        if self.native is None:
            return self._decode
        given = shape, q, kv, batch.block_tables, batch.seq_lens
        if not plan.some_prefill and paged_decode_cuda.refusal(*given) is None:
            return self._decode_few
        start = batch.query_start_loc
        refused = paged_decode_bulk.refusal(*given, start, softcap=attn.softcap, slopes=slopes)
        return self._decode if refused else self._decode_many

    def _decode_few(
        self,
        q: Tensor,
        kv: Tensor,
        out: Tensor,
        plan: TritonPlan,
        shape: Shape,
        attn: Attn,
        slopes: Tensor | None,
        sinks: Tensor | None,
    ) -> None:
        batch, native = plan.batch, self.native
        assert native is not None, "asked for where it fits"
        paged_decode_cuda.paged_decode_cuda(
            native,
            q,
            kv,
            out,
            batch.block_tables,
            batch.seq_lens,
            shape,
            paged_decode_cuda.tune(shape, len(batch.seq_lens), self.processors.count),
            scale=attn.scale,
            softcap=attn.softcap,
            slopes=slopes,
            sinks=sinks,
            first=not plan.started,
        )
        plan.started = True

    def _decode_many(
        self,
        q: Tensor,
        kv: Tensor,
        out: Tensor,
        plan: TritonPlan,
        shape: Shape,
        attn: Attn,
        slopes: Tensor | None,
        sinks: Tensor | None,
    ) -> None:
        batch, native, maps = plan.batch, self.native, self.maps
        assert native is not None and maps is not None and slopes is None, "asked for where it fits"
        work = plan.bulks.get(shape)
        first = work is None
        if work is None:
            tuning = paged_decode_bulk.tune(native, shape, self.processors.count)
            work = plan.bulks[shape] = paged_decode_bulk.plan_bulk(
                native, shape, tuning, batch.block_tables, batch.seq_lens, batch.query_start_loc
            )
        paged_decode_bulk.paged_decode_bulk(
            native, q, kv, out, work, maps, scale=attn.scale, sinks=sinks, first=first
        )

    def _decode(
        self,
        q: Tensor,
        kv: Tensor,
        out: Tensor,
        plan: TritonPlan,
        shape: Shape,
        attn: Attn,
        slopes: Tensor | None,
        sinks: Tensor | None,
    ) -> None:
        batch = plan.batch
        work = plan.decodes.get(shape)
        if work is None:
            count, capability = self.processors.count, self.processors.capability
            tuning = paged_decode.tune(shape, count, capability, len(batch.seq_lens))
            work = plan.decodes[shape] = paged_decode.plan_decode(
                shape, tuning, batch.block_tables, batch.seq_lens, batch.query_start_loc
            )
        paged_decode.paged_decode(
            q,
            kv,
            out,
            work,
            scale=attn.scale,
            softcap=attn.softcap,
            slopes=slopes,
            sinks=sinks,
        )

    def _prefill(
        self,
        q: Tensor,
        kv: Tensor,
        out: Tensor,
        plan: TritonPlan,
        shape: Shape,
        attn: Attn,
        slopes: Tensor | None,
        sinks: Tensor | None,
    ) -> None:
        batch, scale = plan.batch, attn.scale
        capability, count = self.processors.capability, self.processors.count
        plain = attn.softcap is None and slopes is None and q.dtype == kv.dtype
        if plain and paged_prefill_wgmma.refusal(shape, q, kv, capability) is None:
            work = self._tiles(plan, paged_prefill_wgmma.TILE_TOKENS, shape)
            kv_write.clear_tails(kv, batch.block_tables, batch.seq_lens, batch.query_start_loc)
            paged_prefill_wgmma.paged_prefill_wgmma(
                q,
                kv,
                out,
                batch.block_tables,
                work,
                shape,
                self.descriptors,
                scale=scale,
                sinks=sinks,
                programs=count,
            )
            return
        tuning = paged_prefill.tune(shape, count, capability)
        paged_prefill.paged_prefill(
            q,
            kv,
            out,
            batch.block_tables,
            self._tiles(plan, paged_prefill.tokens_of(shape, tuning), shape),
            shape,
            tuning,
            scale=scale,
            softcap=attn.softcap,
            slopes=slopes,
            sinks=sinks,
        )

    def _tiles(self, plan: TritonPlan, tokens: int, shape: Shape) -> PrefillPlan:
        key = tokens, shape.window, shape.chunk
        work = plan.prefills.get(key)
        if work is None:
            batch = plan.batch
            work = plan.prefills[key] = paged_prefill.plan_prefill(
                tokens,
                batch.slot_mapping.shape[0],
                batch.seq_lens,
                batch.query_start_loc,
                window=shape.window,
                chunk=shape.chunk,
            )
        return work


def shape_of(attn: Attn, block_size: int, kv_dtype: torch.dtype) -> Shape:
    """What the kernels are compiled for."""
    width = attn.values_in_keys or attn.head_dim
    return Shape(
        kv_heads=attn.kv_heads,
        group=attn.heads // attn.kv_heads,
        width=width,
        rest=attn.head_dim - width,
        latent=attn.values_in_keys is not None,
        page=block_size,
        itemsize=max(2, kv_dtype.itemsize),
        window=attn.window or 0,
        chunk=attn.chunk or 0,
    )
