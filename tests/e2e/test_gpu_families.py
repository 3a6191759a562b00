"""Tiny families on a GPU: greedy tokens of the CPU in float32, and logits near them in bfloat16."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pagedserve.config import Config
from pagedserve.device import pick
from pagedserve.engine.block_pool import BlockPool
from pagedserve.engine.scheduler import Scheduler
from pagedserve.models.loading import load_model
from pagedserve.request import Request, SamplingParams
from pagedserve.worker.start import Worker, make, settle
from tests.checkpoints import save, tiny_model
from tests.models.families import CASES
from tests.models.paged import PagedRun
from tests.models.test_parity import random_prompts

pytestmark = pytest.mark.gpu
FAMILIES = (
    "llama",
    "mistral",
    "qwen3",
    "gemma2",
    "gemma3",
    "gpt2",
    "bloom",
    "phi",
    "mixtral",
    "deepseek v2",
    "deepseek v3",
    "gpt_oss",
    "llama4",
    "olmo2",
)
NEW_TOKENS = 32
BF16_ERROR = 0.06  # of the largest logit; three layers round some fifty times to 8 bits
SHARE = 0.9  # of positions: where two experts score alike, rounding may choose the other one


@pytest.fixture(params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    case = CASES[request.param]
    save(tiny_model(case.family, **case.config), tmp_path)
    return request.param, tmp_path


def test_greedy_tokens_equal_the_cpu_s(checkpoint: tuple[str, Path]) -> None:
    name, directory = checkpoint
    prompts = random_prompts(CASES[name], 256) * 2 + [[5]]
    on_cpu = written(directory, prompts, device="cpu")
    for eager in (True, False):
        gpu = written(directory, prompts, device="cuda", dtype="float32", enforce_eager=eager)
        assert gpu == on_cpu


def test_logits_in_bfloat16_are_near_those_of_the_cpu(checkpoint: tuple[str, Path]) -> None:
    name, directory = checkpoint
    prompts = random_prompts(CASES[name], 256)
    exact = load_model(directory, device=pick("cpu"), dtype="float32")
    rounded = load_model(directory, device=pick("cuda"), dtype="bfloat16")
    wanted = PagedRun(exact, block_size=16).prefill_and_decode(prompts, 24)
    run = PagedRun(rounded, block_size=16, kv_dtype=torch.bfloat16, device="cuda")
    for got, want in zip(run.prefill_and_decode(prompts, 24), wanted, strict=True):
        errors = (got.cpu() - want).abs().amax(-1) / want.abs().max()
        assert errors.quantile(SHARE) <= BF16_ERROR, errors.tolist()


def written(directory: Path, prompts: list[list[int]], **options: object) -> list[list[int]]:
    """Greedy answers of one worker, prompts in chunks, all in one batch, steps overlapped."""
    limits = {"max_num_seqs": 8, "max_num_batched_tokens": 48, "block_size": 16}
    limits |= {"num_gpu_blocks_override": 200, "enable_prefix_caching": False}
    config = Config.from_options({"model": str(directory), **limits, **options})
    device = pick(config.model.device)
    device.prepare()
    model = load_model(directory, dtype=config.model.dtype, device=device, context=256)
    info = replace(settle(config, device, model), eos_token_ids=[])
    return drive(make(config, device, model, info), prompts, block_size=16)


def drive(worker: Worker, prompts: list[list[int]], block_size: int) -> list[list[int]]:
    info = worker.info
    scheduler = Scheduler(
        BlockPool(info.num_blocks, caching=False),
        block_size=block_size,
        max_num_seqs=info.max_num_seqs,
        max_num_batched_tokens=info.max_num_batched_tokens,
    )
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    for id, prompt in enumerate(prompts):
        scheduler.add(Request(id, prompt, params, 0, 0, float(id)))
    answers: list[list[int]] = [[] for _ in prompts]
    pending = []
    while not scheduler.idle or pending:
        step = scheduler.schedule()
        if step:
            pending.append((step, worker.launch(step)))
        if pending and (len(pending) > 1 or not step):
            done, launched = pending.pop(0)
            committed = scheduler.commit(done, launched.result())
            assert not committed.failed
            for id, token in zip(committed.ids, committed.token_ids, strict=True):
                answers[id].append(token)
    return answers
