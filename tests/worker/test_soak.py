"""The worker under random load gives the same tokens at any depth; on a GPU, from graphs too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pagedserve.config import Config
from pagedserve.device import pick
from pagedserve.models.loading import load_model
from pagedserve.worker.start import Worker, make, settle
from tests.checkpoints import tiny_checkpoint
from tests.worker.soak import soak

BLOCK_SIZE = 4
LIMITS = {
    "block_size": BLOCK_SIZE,
    "max_num_seqs": 12,
    "max_num_batched_tokens": 96,
    "max_model_len": 160,
    "num_gpu_blocks_override": 150,  # far fewer than all of them need: preemption
}
GPU_STEPS = 10_000


def worker(directory: Path, **options: object) -> Worker:
    """Without the engine's process around it."""
    config = Config.from_options({"model": str(directory), **LIMITS, **options})
    device = pick(config.model.device)
    device.prepare()
    model = load_model(directory, dtype=config.model.dtype, device=device, context=160)
    info = replace(settle(config, device, model), eos_token_ids=[2])
    return make(config, device, model, info)


def test_depths_agree_on_a_cpu(tmp_path: Path) -> None:
    tiny_checkpoint("llama", tmp_path)
    one, two = (
        soak(worker(tmp_path, device="cpu"), block_size=BLOCK_SIZE, steps=300, depth=depth)
        for depth in (1, 2)
    )
    assert_agree(one, two)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_graphs_give_the_tokens_of_the_same_steps_op_by_op(family: str, tmp_path: Path) -> None:
    """In the model's own 16 bits: to the last bit."""
    tiny_checkpoint(family, tmp_path, head_dim=64)
    runs = []
    for eager in (False, True):
        one = worker(tmp_path, device="cuda", dtype="bfloat16", enforce_eager=eager)
        steps = GPU_STEPS if family == "llama" else 1500
        runs.append(soak(one, block_size=BLOCK_SIZE, steps=steps, depth=2))
    assert runs[0] == runs[1]


@pytest.mark.gpu
def test_overlapped_graphs_give_the_tokens_of_a_cpu(tmp_path: Path) -> None:
    tiny_checkpoint("llama", tmp_path)
    on_cpu = soak(worker(tmp_path, device="cpu"), block_size=BLOCK_SIZE, steps=300, depth=1)
    gpu = worker(tmp_path, device="cuda", dtype="float32")
    assert_agree(on_cpu, soak(gpu, block_size=BLOCK_SIZE, steps=300, depth=2))


def assert_agree(one: dict[int, list[int]], two: dict[int, list[int]]) -> None:
    """An aborted request may have come further in one of them."""
    assert one.keys() == two.keys() and sum(map(len, one.values())) > 500
    for id, tokens in one.items():
        length = min(len(tokens), len(two[id]))
        assert tokens[:length] == two[id][:length], id
