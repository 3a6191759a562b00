"""The memory plan is arithmetic."""

import pytest

from pagedserve.config import CacheConfig
from pagedserve.errors import StartupError
from pagedserve.spec import Attn, DecoderSpec, Layer, Mlp, Norm
from pagedserve.worker.memory import Limits, gpu_bytes, plan_blocks, workspace_bytes
from pagedserve.worker.prompt_logprobs import LOGITS_ROWS

GIB = 1 << 30
LIMITS = Limits(max_num_seqs=4, max_num_batched_tokens=512, max_model_len=1000)


def plan(cache: CacheConfig | None = None, **changes) -> int:
    given = dict(
        block_bytes=1 << 20,
        workspace=GIB,
        free_bytes=8 * GIB,
        total_bytes=10 * GIB,
        on_gpu=True,
        limits=Limits(1000, 512, 100_000),
    )
    return plan_blocks(cache or CacheConfig(), **given | changes)


def test_a_gpu_s_cache_is_what_workspace_and_headroom_leave() -> None:
    assert plan() == 6 * 1024  # 8 free - 1 workspace - 10 % of 10 for others, in blocks of 1 MiB
    assert plan(CacheConfig(gpu_memory_utilization=0.5)) == 2 * 1024


def test_a_cpu_s_cache_is_a_share_of_what_is_free_and_never_huge() -> None:
    assert plan(on_gpu=False) == 2 * 1024
    assert plan(on_gpu=False, free_bytes=100 * GIB) == 4 * 1024


def test_no_more_than_every_sequence_can_use() -> None:
    assert plan(limits=LIMITS) == 4 * 63  # 1000 tokens are 63 blocks of 16


def test_what_was_asked_for_is_given() -> None:
    assert plan(CacheConfig(num_gpu_blocks_override=7)) == 7
    assert plan(CacheConfig(kv_cache_memory_bytes=100 << 20)) == 100


def test_no_room_is_an_error_with_the_arithmetic() -> None:
    with pytest.raises(StartupError, match="2048 MiB free of 10240 MiB, 1024 MiB of workspace"):
        plan(free_bytes=2 * GIB, cache=CacheConfig(gpu_memory_utilization=0.5))


def test_the_workspace_grows_with_step_context_and_vocabulary() -> None:
    layer = Layer(Attn(4, 2, 8, 1.0), Mlp(64))
    spec = DecoderSpec(32, 100, 1000, (layer,), Norm(), {})
    base = workspace_bytes(spec, LIMITS, 2)
    assert base == 512 * (8 * 32 + 3 * 64) * 2 + 2 * 1000 * 32 * 4 + 4 * 100 * 4 * 6


def test_a_gpu_also_holds_graphs_and_permanent_rows() -> None:
    layer = Layer(Attn(4, 2, 8, 1.0), Mlp(64))
    spec = DecoderSpec(32, 100, 1000, (layer,), Norm(), {})
    rows = 5 * (1001 * 8 + 63 * 4 * 2)  # four sequences and the scratch slot
    logits = (LOGITS_ROWS - 4) * 100 * 4 * 6  # of a prompt's tokens, more than there are sequences
    assert gpu_bytes(spec, LIMITS, 2, 16) == 2 * workspace_bytes(spec, LIMITS, 2) + logits + rows
    many = Limits(LOGITS_ROWS + 1, 512, 1000)
    rows = (LOGITS_ROWS + 2) * (1001 * 8 + 63 * 4 * 2)
    assert gpu_bytes(spec, many, 2, 16) == 2 * workspace_bytes(spec, many, 2) + rows
