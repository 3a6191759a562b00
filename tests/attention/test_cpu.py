"""The C++ backend behind the seam: `Attn` says what is computed, layers differ in shape."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pagedserve.attention import Batch
from pagedserve.attention.cpu import CpuAttention
from pagedserve.device import Cpu, pick
from pagedserve.kernels import reference
from pagedserve.spec import Attn
from pagedserve.worker.kv_cache import block_elements, layer_views

BLOCK = 4
PLAIN = Attn(heads=6, kv_heads=2, head_dim=24, scale=0.3)
LATENT = Attn(heads=5, kv_heads=1, head_dim=40, scale=0.2, values_in_keys=32)
EVERYTHING = replace(PLAIN, window=11, chunk=7, softcap=3.0, alibi=8.0, sinks=True)


@pytest.fixture
def backend() -> CpuAttention:
    found = CpuAttention(pick("cpu"))
    if found.kernels is None:
        pytest.skip("no C++ kernels here")
    return found


def batch_of(lens: list[int], counts: list[int], tables: Tensor) -> Batch:
    spans = [range(n - c, n) for n, c in zip(lens, counts, strict=True)]
    slots = [
        int(table[p // BLOCK]) * BLOCK + p % BLOCK
        for table, span in zip(tables, spans, strict=True)
        for p in span
    ]
    return Batch(
        input_ids=torch.zeros(sum(counts), dtype=torch.int64),
        positions=torch.tensor([p for span in spans for p in span]),
        slot_mapping=torch.tensor(slots),
        block_tables=tables.int(),
        seq_lens=torch.tensor(lens),
        query_start_loc=torch.tensor([0, *itertools.accumulate(counts)]),
        counts=counts,
        lens=lens,
        num_decodes=counts.count(1),
        block_size=BLOCK,
    )


def test_layers_of_any_kind_share_one_cache(backend: CpuAttention) -> None:
    """A prompt, then a step of one token and one of several, in every layer of a mixed cache."""
    layers = [
        PLAIN,
        LATENT,
        replace(PLAIN, window=5),
        replace(PLAIN, chunk=6),
        replace(LATENT, softcap=2.0, sinks=True, window=9),
        EVERYTHING,
    ]
    width = block_elements(layers, BLOCK, torch.float32)
    cache = torch.full((21, width), math.nan)
    views = layer_views(cache, layers, BLOCK)
    wanted_views = layer_views(cache.clone(), layers, BLOCK)
    tables = torch.randperm(21)[:20].view(2, 10)
    for lens, counts in (([17, 23], [17, 23]), ([18, 30], [1, 7]), ([19, 31], [1, 1])):
        batch = batch_of(lens, counts, tables)
        plan = backend.plan(batch)
        for attn, kv, wanted_kv in zip(layers, views, wanted_views, strict=True):
            heads = torch.randn(sum(counts), attn.heads + 2 * attn.kv_heads, attn.head_dim)
            q, k, v = heads.split((attn.heads, attn.kv_heads, attn.kv_heads), 1)
            slopes = torch.rand(attn.heads) if attn.alibi else None
            sinks = torch.randn(attn.heads) if attn.sinks else None
            values = None if attn.values_in_keys else v
            got = backend.forward(q, k, values, kv, plan, attn, slopes=slopes, sinks=sinks)
            reference.kv_write(wanted_kv, batch.slot_mapping, k, values)
            wanted = reference.paged_attention(
                q,
                wanted_kv,
                tables,
                lens,
                counts,
                scale=attn.scale,
                window=attn.window,
                chunk=attn.chunk,
                softcap=attn.softcap,
                slopes=slopes,
                sinks=sinks,
                values_in_keys=attn.values_in_keys,
            )
            assert got.is_contiguous()
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_every_kind_of_attention_is_supported_in_float32(backend: CpuAttention) -> None:
    for attn in (PLAIN, LATENT, EVERYTHING):
        assert backend.supports(attn, torch.float32, BLOCK) is None
        for dtype in (torch.bfloat16, torch.float8_e4m3fn):
            assert f"{dtype}" in str(backend.supports(attn, dtype, BLOCK))
    odd = replace(PLAIN, heads=5)
    assert "5 query heads" in str(backend.supports(odd, torch.float32, BLOCK))


def test_without_kernels_it_supports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagedserve.kernels.cpu.load", lambda: None)
    assert "C++" in str(CpuAttention(Cpu()).supports(PLAIN, torch.float32, BLOCK))


def test_slopes_and_sinks_come_where_the_layer_has_them_only(backend: CpuAttention) -> None:
    kv = torch.zeros(3, 2, BLOCK, PLAIN.kv_heads, PLAIN.head_dim)
    plan = backend.plan(batch_of([3], [3], torch.tensor([[1]])))
    q, k = torch.randn(3, 6, 24), torch.randn(3, 2, 24)
    per_head = torch.rand(6)
    with pytest.raises(AssertionError):
        backend.forward(q, k, k, kv, plan, PLAIN, slopes=per_head)
    with pytest.raises(AssertionError):
        backend.forward(q, k, k, kv, plan, replace(PLAIN, sinks=True))
