"""What holds of every reference: its checkpoint, its causality, its greedy tokens.

The tests beside this one, test_references_*, compare each with a second witness.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.models.references import REFERENCES, Reference, clear_prompt, greedy, greedy_steps, write
from tests.models.references.twins import drawn, tokens


def is_derived(reference: Reference, key: str) -> bool:
    """A buffer, or the second copy of a tied head: checkpoints have them, nothing reads them."""
    copied = "RWForCausalLM" in reference.config["architectures"] and key == "lm_head.weight"
    return copied or key.endswith(("inv_freq", "relative_pe.slopes"))


@pytest.mark.parametrize("name", REFERENCES)
def test_every_tensor_of_a_checkpoint_but_buffers_moves_the_logits(name: str) -> None:
    reference = REFERENCES[name]
    tensors, ids = drawn(reference), tokens(reference)  # enough of them to meet every expert
    plain = reference.forward(reference.config, tensors, ids)
    for key, tensor in tensors.items():
        bent = {**tensors, key: tensor * 1.5 + 0.1}
        moved = (reference.forward(reference.config, bent, ids) - plain).abs().max()
        assert moved > 1e-3 * plain.abs().max() or is_derived(reference, key), key


@pytest.mark.parametrize("name", REFERENCES)
def test_a_later_token_never_moves_an_earlier_logit(name: str) -> None:
    reference = REFERENCES[name]
    tensors, ids = drawn(reference), tokens(reference, 13)
    whole = reference.forward(reference.config, tensors, ids)
    assert torch.allclose(
        reference.forward(reference.config, tensors, ids[:7]), whole[:7], atol=1e-4
    )


@pytest.mark.parametrize("name", REFERENCES)
def test_a_written_checkpoint_is_the_reference(name: str, tmp_path: Path) -> None:
    reference = REFERENCES[name]
    directory = write(reference, tmp_path / "model", seed=3)
    assert json.loads((directory / "config.json").read_text()) == reference.config
    read = load_file(directory / "model.safetensors")
    ours = reference.weights(reference.config, 3)
    assert read.keys() == ours.keys()
    assert all(torch.equal(read[key], ours[key]) for key in ours)
    assert all(tensor.dtype == torch.float32 for tensor in read.values())
    other = drawn(reference)
    fixed = [key for key in ours if torch.equal(ours[key], other[key])]
    assert all(is_derived(reference, key) for key in fixed)


@pytest.mark.parametrize("name", REFERENCES)
def test_greedy_takes_the_likeliest_token_of_each_step(name: str) -> None:
    reference = REFERENCES[name]
    prompt = tokens(reference, 5)
    new = greedy(reference, prompt, 6)
    best = reference.logits(prompt + new).argmax(-1).tolist()
    assert new == best[4:10]


@pytest.mark.parametrize("name", REFERENCES)
def test_one_token_is_a_sequence(name: str) -> None:
    reference = REFERENCES[name]
    ids = tokens(reference, 9)
    assert torch.allclose(reference.logits(ids[:1])[0], reference.logits(ids)[0], atol=1e-4)


@pytest.mark.parametrize("name", REFERENCES)
def test_a_clear_prompt_leads_past_no_near_tie(name: str) -> None:
    reference = REFERENCES[name]
    prompt = clear_prompt(reference, 5, 8, seed=1)
    assert len(prompt) == 5
    assert min(lead for _, lead in greedy_steps(reference, prompt, 8, seed=1)) >= 1e-3
    assert clear_prompt(reference, 5, 8, seed=1) == prompt


def test_a_prompt_that_cannot_be_clear_is_said_so() -> None:
    with pytest.raises(AssertionError, match="aquila: every prompt of 3 tokens meets a near tie"):
        clear_prompt(REFERENCES["aquila"], 3, 2, lead=2.0)
