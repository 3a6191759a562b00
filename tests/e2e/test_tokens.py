"""The whole engine against transformers: same tokens, whatever shares the batch."""

from __future__ import annotations

import time

import pytest

from pagedserve import LLM, SamplingParams
from pagedserve.engine.channel import Stats
from tests.e2e.conftest import NEW_TOKENS, prompts


def stats_when_idle(llm: LLM) -> Stats:
    """The engine's totals once nothing runs."""
    for _ in range(100):
        llm._client.poll(0.05)
        stats = llm._client.stats
        if stats and not stats.running and not stats.waiting and stats.blocks_used == 0:
            return stats
        time.sleep(0.01)
    raise AssertionError(f"not idle: {llm._client.stats}")


@pytest.mark.parametrize(
    ("caching", "overlap", "blocks"),
    [(True, False, None), (False, True, None), (True, True, 90), (False, False, 90)],
)
def test_greedy_tokens_equal_transformers(
    reference: list[list[int]], caching: bool, overlap: bool, blocks: int | None
) -> None:
    # 90 blocks of 4 tokens hold the longest prompt with its answer, and little beside it.
    options = {} if blocks is None else {"num_gpu_blocks_override": blocks, "block_size": 4}
    with LLM(
        enable_prefix_caching=caching,
        async_scheduling=overlap,
        max_num_batched_tokens=96,
        **options,
    ) as llm:
        asked = [{"prompt_token_ids": ids} for ids in prompts()]
        outputs = llm.generate(asked, SamplingParams(temperature=0, max_tokens=NEW_TOKENS))
        stats = stats_when_idle(llm)
    ours = [output.outputs[0].token_ids for output in outputs]
    assert ours == reference
    assert (stats.preemptions > 0) == (blocks is not None)
    if blocks is None or not caching:
        assert (stats.prefix_hits > 0) == caching


def test_seeded_sampling_gives_the_same_tokens_alone_and_in_any_batch() -> None:
    params = [
        SamplingParams(
            seed=number,
            max_tokens=16,
            temperature=[1.0, 0.7, 1.5][number % 3],
            top_p=[1.0, 0.8][number % 2],
            top_k=[0, 0, 40][number % 3],
            presence_penalty=[0.0, 0.5, 0.0, 0.0][number % 4],
        )
        for number in range(16)
    ]
    asked = [{"prompt_token_ids": ids} for ids in prompts()[:16]]
    with LLM(max_num_batched_tokens=64) as llm:
        together = llm.generate(asked, params)
        backwards = llm.generate(asked[::-1], params[::-1])[::-1]
        alone = [llm.generate(one, own)[0] for one, own in zip(asked, params, strict=True)]
    tokens = [
        [output.outputs[0].token_ids for output in run] for run in (together, backwards, alone)
    ]
    assert tokens[0] == tokens[1] == tokens[2]


def test_a_reset_forgets_the_cached_prompts() -> None:
    ask = [{"prompt_token_ids": list(range(10, 80))}], SamplingParams(temperature=0, max_tokens=1)
    hits = []
    with LLM() as llm:
        for _ in range(2):
            llm.generate(*ask)
        hits.append(stats_when_idle(llm).prefix_hits)
        llm.reset_prefix_cache()
        llm.generate(*ask)
        hits.append(stats_when_idle(llm).prefix_hits)
    assert hits == [64, 64]


def test_a_request_without_a_seed_is_repeatable_by_the_engine_s() -> None:
    runs = []
    for _ in range(2):
        with LLM(seed=3) as llm:
            runs.append(llm.generate("Once upon a time", SamplingParams(max_tokens=12, n=3)))
    texts = [[choice.text for choice in run[0].outputs] for run in runs]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 1


def test_logprobs_equal_transformers() -> None:
    import torch
    import transformers

    from pagedserve.config import DEMO_MODEL

    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    asked = [prompts()[number] for number in (0, 1, 7)]
    wanted = SamplingParams(temperature=0, max_tokens=8, logprobs=5, prompt_logprobs=2)
    with LLM(max_num_batched_tokens=50) as llm:
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in asked], wanted)
    for ids, output in zip(asked, outputs, strict=True):
        completion = output.outputs[0]
        with torch.inference_mode():
            logits = model(torch.tensor([ids + completion.token_ids])).logits[0]
        expected = logits.log_softmax(-1)
        assert completion.logprobs is not None and output.prompt_logprobs is not None
        assert output.prompt_logprobs[0] is None
        tables = output.prompt_logprobs[1:] + completion.logprobs
        targets = ids[1:] + completion.token_ids
        for position, (token, table) in enumerate(zip(targets, tables, strict=True)):
            row = expected[position]
            assert table is not None
            assert table[token].logprob == pytest.approx(float(row[token]), abs=1e-4)
            assert table[token].rank == 1 + int((row > row[token]).sum())
            top = row.topk(2 if position < len(ids) - 1 else 5).indices.tolist()
            assert set(table) == {token, *top}
