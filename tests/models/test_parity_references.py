"""Families without a transformers class: the paged path equals the references of `references/`.

As in `test_parity`: two sequences in one batch, prompts in chunks, then a token at a time. What
follows the prompts is written by our own path, one sequence at a time; the reference would have
written the same if at each place its likeliest token is the one that stands there.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pagedserve.device import pick
from pagedserve.models.loading import LoadedModel, load_model
from tests.models.paged import PagedRun
from tests.models.references import REFERENCES, Reference, write
from tests.models.references.drawing import Weights

NEW_TOKENS = 32
MAX_ERROR = 1e-5
LENGTHS = (23, 45)
SHORT = {"baichuan2-13b": (9, 17)}  # its vocabulary is as large as the real one's
# The rotary base follows from the longest context that is served.
CONTEXT = 100
BY_CONTEXT = ("qwen past its length, ntk", "qwen past its length")


@pytest.mark.parametrize("name", REFERENCES)
def test_logits_and_greedy_tokens_equal_those_of_the_reference(name: str, tmp_path: Path) -> None:
    reference = REFERENCES[name]
    write(reference, tmp_path)
    forward = forward_of(reference, load_file(tmp_path / "model.safetensors"))
    model = load_model(tmp_path, device=pick("cpu"), context=CONTEXT)
    prompts = random_prompts(reference)
    written = [greedy(model, prompt) for prompt in prompts]
    run = PagedRun(model, block_size=5)
    found = run.prefill_and_decode(written, 24, decode_from=[len(prompt) for prompt in prompts])
    for got, tokens, prompt in zip(found, written, prompts, strict=True):
        with torch.inference_mode():
            want = forward(tokens)
        assert got.dtype == torch.float32
        assert (got - want).abs().max() / want.abs().max() <= MAX_ERROR
        for logits in (got, want):
            assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens[len(prompt) :]


def forward_of(reference: Reference, weights: Weights) -> Callable[[list[int]], Tensor]:
    """input_ids → logits [T, vocab]."""
    forward = partial(reference.forward, reference.config, weights)
    if reference.name in BY_CONTEXT:
        return partial(forward, prompt_length=CONTEXT)
    return forward


def random_prompts(reference: Reference) -> list[list[int]]:
    choice = torch.Generator().manual_seed(7)
    lengths, vocab = SHORT.get(reference.name, LENGTHS), reference.vocab_size
    return [torch.randint(3, vocab, (n,), generator=choice).tolist() for n in lengths]


def greedy(model: LoadedModel, prompt: list[int]) -> list[int]:
    """The prompt and the likeliest tokens after it."""
    run, tokens = PagedRun(model, block_size=7, seed=1), list(prompt)
    run.allocate([[0] * (len(prompt) + NEW_TOKENS)], random.Random(1))
    done = 0
    while len(tokens) < len(prompt) + NEW_TOKENS:
        hidden = run.step([tokens], [0], [done], [len(tokens) - done])
        done = len(tokens)
        tokens.append(int(model.decoder.logits(hidden[-1:]).argmax()))
    return tokens
