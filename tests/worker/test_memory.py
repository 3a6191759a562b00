"""The memory plan is arithmetic, and nothing is left out of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from pagedserve.attention.base import Most
from pagedserve.config import Config
from pagedserve.device import Cpu, Memory, Outline
from pagedserve.errors import StartupError
from pagedserve.kernels.matrix import Matrix, PlainMatrix
from pagedserve.models.loading import LoadedModel, load_model
from pagedserve.spec import Attn, DecoderSpec, Layer, Mlp, Norm
from pagedserve.worker import memory
from pagedserve.worker.memory import MemoryPlan, Place, plan, tensor_bytes
from pagedserve.worker.sizes import Limits
from tests.checkpoints import tiny_checkpoint

GIB = 1 << 30
BLOCK = 2 * 2 * 16 * 2 * 64 * 2  # layers, keys and values, tokens, heads, numbers, bytes
GPU, CPU = Limits(256, 8192, 0), Limits(64, 512, 0)


class Backend:
    """Attention that takes 1 MiB for each row of the largest step."""

    def __init__(self, *, needs_lens: bool = True):
        self.needs_lens = needs_lens

    def workspace_bytes(self, attns: list[Attn], most: Most, kv_dtype: torch.dtype) -> int:
        return most.rows << 20


def model(**changes: Any) -> LoadedModel:
    layer = Layer(Attn(4, 2, 64, 1.0), Mlp(512))
    spec = DecoderSpec(256, 1000, 40_000, (layer, layer), Norm(), {})
    loaded = LoadedModel(spec, cast(Any, SimpleNamespace()), [2], 40_000, torch.bfloat16, GIB)
    return replace(loaded, **changes)


def planned(
    free: float = 8, total: float = 10, *, on_gpu: bool = True, lens: bool = True, **options: Any
) -> MemoryPlan:
    """With the weights loaded, `free` of `total` GiB are."""
    config = Config.from_options(options)
    place = Place(
        Memory(int(free * GIB), int(total * GIB)), on_gpu, cast(Any, Backend(needs_lens=lens))
    )
    loaded = model(max_model_len=options.get("max_model_len", 40_000))
    return plan(config, loaded, place, GPU if on_gpu else CPU)


def test_a_gpu_s_parts_are_the_whole() -> None:
    found = planned()
    assert found.others == GIB + GIB  # taken by others, and 10 % of 10
    assert found.weights == GIB and found.block_bytes == BLOCK
    assert sum(found.items().values()) == found.total == 10 * GIB
    assert 0 <= found.items()["unused"] < BLOCK
    assert found.notes == () and found.limits == Limits(256, 8192, 40_000)
    assert planned(gpu_memory_utilization=0.5).others == 6 * GIB


def test_the_largest_step_grows_with_its_tokens_rows_and_vocabulary() -> None:
    few, many = planned(max_num_batched_tokens=512), planned(max_num_batched_tokens=1024)
    assert many.step - few.step == 512 * ((6 * 256 + 3 * 512) * 2 + memory.COLUMN_BYTES)
    assert planned(max_num_seqs=9).step - planned(max_num_seqs=8).step == (1 << 20) + 1000 * 24
    assert planned(max_num_seqs=9).rows - planned(max_num_seqs=8).rows == 40_001 * 8 + 2500 * 8


def test_a_step_that_is_never_captured_has_no_memory_for_graphs() -> None:
    assert planned(lens=True).graphs == 0
    pytest.importorskip("triton")
    assert planned(lens=False, enforce_eager=True).graphs == 0 < planned(lens=False).graphs


def test_a_cpu_s_cache_is_a_share_of_what_is_free_and_never_huge() -> None:
    assert planned(8, 10, on_gpu=False).cache == 2 * GIB
    assert planned(100, 120, on_gpu=False, max_num_seqs=300).cache == 4 * GIB
    assert planned(100, 120, on_gpu=False).limits == Limits(64, 512, 40_000)


def test_no_more_than_every_sequence_can_use() -> None:
    found = planned(max_num_seqs=4, max_model_len=1000)
    assert found.num_blocks == 4 * 63 and found.items()["unused"] > 6 * GIB


def test_what_was_asked_for_is_given() -> None:
    assert planned(num_gpu_blocks_override=7, max_model_len=100).num_blocks == 7
    assert planned(kv_cache_memory_bytes=100 * BLOCK + 5, max_model_len=100).num_blocks == 100
    asked = {"max_num_seqs": 300, "max_num_batched_tokens": 9000}
    assert planned(**asked).limits == Limits(300, 9000, 40_000)


def test_a_context_that_nobody_asked_for_is_what_the_cache_holds() -> None:
    found = planned(num_gpu_blocks_override=7)
    assert found.limits.max_model_len == 112 and found.num_blocks == 7
    assert found.notes == (
        "the context is 112 tokens and not 40000, because the KV cache holds no more",
    )
    small = planned(free=1.48, total=10)
    assert 8192 <= small.limits.max_model_len < 40_000
    assert small.limits.max_model_len <= small.num_tokens


def test_a_context_that_was_asked_for_and_does_not_fit_is_an_error_that_says_what_would() -> None:
    with pytest.raises(StartupError, match=r"1000 does not fit.*ask for 112 at most, raise --num"):
        planned(num_gpu_blocks_override=7, max_model_len=1000)
    with pytest.raises(StartupError, match="raise --kv-cache-memory-bytes, or leave it out"):
        planned(kv_cache_memory_bytes=7 * BLOCK, max_model_len=1000)


def test_a_small_gpu_makes_smaller_steps_before_it_gives_up_context() -> None:
    seen = []
    for free in (2.6, 1.9, 1.7, 1.45, 1.3):
        found = planned(free=free, total=10)
        seen.append((found.limits.max_num_batched_tokens, found.limits.max_num_seqs))
        flags = [note.split(" ")[0] for note in found.notes]
        assert ("--max-num-batched-tokens" in flags) == (seen[-1][0] < 8192)
        assert ("--max-num-seqs" in flags) == (seen[-1][1] < 256)
        assert sum(found.items().values()) == found.total
    assert seen == sorted(seen, reverse=True) and seen[0] == (8192, 256) and seen[-1][1] < 256
    fixed = planned(free=1.45, total=10, max_num_seqs=200, max_num_batched_tokens=4096)
    assert fixed.limits.max_num_seqs == 200 and fixed.limits.max_num_batched_tokens == 4096


def test_no_room_is_an_error_with_the_arithmetic() -> None:
    with pytest.raises(StartupError) as caught:
        planned(free=1.0)
    message = caught.value.message
    assert "a single block does not fit the KV cache" in message and "weights 1.00 GiB" in message
    assert ", of 10.00 GiB)" in message and "raise --gpu-memory-utilization" in message
    assert len(message) < 600


def test_more_rows_than_a_step_of_a_gpu_can_have_are_refused() -> None:
    pytest.importorskip("triton")
    assert planned(20, 30, lens=False, max_num_seqs=4096).limits.max_num_seqs == 4096
    with pytest.raises(StartupError, match="--max-num-seqs is 4097, but .* 4096 rows at most"):
        planned(20, 30, lens=False, max_num_seqs=4097)


class Plain(Cpu):
    """Without kernels of ours, and with weights as they are."""

    def kernels(self, dtype: torch.dtype) -> None:
        return None

    def matrix(self, weight: torch.Tensor) -> Matrix:
        return PlainMatrix(weight)


@pytest.mark.parametrize(
    "family", ("llama", "qwen3", "gpt2", "gemma2", "mixtral", "deepseek_v3", "falcon", "phi")
)
def test_an_outline_weighs_what_the_model_does(family: str, tmp_path: Path) -> None:
    tiny_checkpoint(family, tmp_path)
    outline = Outline(Memory(1, 1), is_gpu=False)
    loaded = load_model(tmp_path, device=Plain(), load_format="dummy")
    drawn = load_model(tmp_path, device=outline)
    assert drawn.weight_bytes == loaded.weight_bytes > 0
    assert drawn.spec == loaded.spec and drawn.max_model_len == loaded.max_model_len
    assert all(each.is_meta for each in memory.tensors(drawn.decoder, set()))


def test_tensors_are_counted_once_wherever_they_are_held() -> None:
    one, two = torch.zeros(5), torch.zeros(3, dtype=torch.int64)
    held = {"a": [one, (one, two)], "b": SimpleNamespace(c=torch.zeros(9)), "c": Backend()}
    assert tensor_bytes(held) == 20 + 24
    cycle: list[Any] = [one]
    cycle.append(cycle)
    assert tensor_bytes(cycle) == 20
