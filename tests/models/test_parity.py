"""Every family: logits and greedy tokens through the paged path equal transformers' in float32.

Two sequences of different length in one batch, prompts in chunks, then a token at a time.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from pagedserve.device import pick
from pagedserve.models.loading import load_model
from tests.checkpoints import save, tiny_model
from tests.models.families import CASES, Case
from tests.models.paged import PagedRun

NEW_TOKENS = 32
MAX_ERROR = 1e-5


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_tokens_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    reference = tiny_model(case.family, attention=case.attention, **case.config)
    save(reference, tmp_path)
    overrides = {"architectures": [case.architecture]} if case.architecture else None
    model = load_model(tmp_path, device=pick("cpu"), context=case.context, hf_overrides=overrides)
    prompts = random_prompts(case, model.spec.vocab_size)
    written = [greedy(reference, prompt) for prompt in prompts]
    run = PagedRun(model, block_size=case.block_size)
    found = run.prefill_and_decode(written, 24, decode_from=[len(prompt) for prompt in prompts])
    for got, tokens, prompt in zip(found, written, prompts, strict=True):
        want = truth(reference, tokens)
        assert got.dtype == torch.float32
        assert (got - want).abs().max() / want.abs().max() <= MAX_ERROR
        assert got[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens[len(prompt) :]


def random_prompts(case: Case, vocab: int) -> list[list[int]]:
    choice = torch.Generator().manual_seed(7)
    return [torch.randint(3, vocab, (n,), generator=choice).tolist() for n in case.lengths]


def greedy(model: Any, prompt: list[int]) -> list[int]:
    """The prompt and what transformers' `generate` writes after it."""
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    model.generation_config = config
    ids = torch.tensor([prompt])
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # transformers' own
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    written: list[int] = out[0].tolist()
    assert len(written) == len(prompt) + NEW_TOKENS
    return written


def truth(model: Any, tokens: list[int]) -> torch.Tensor:
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # transformers' own
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return logits
