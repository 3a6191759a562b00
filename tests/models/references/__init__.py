"""References for the families that have no transformers class, from papers and published configs.

Each module knows one family: configs as the hub has them, random tensors under the published names,
and the forward pass in plain float32 torch, naive and without a cache. None of them knows the
package under test: they are what its decoder is compared with. `REFERENCES` holds them by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.models.references import (
    baichuan,
    bailing_moe,
    chatglm,
    decilm,
    deepseek_moe,
    exaone,
    internlm2,
    jais,
    llama,
    minicpm,
    mpt,
    nemotron_nas,
    orion,
    qwen,
    refined_web,
    solar,
    stablelm_epoch,
    telechat2,
)
from tests.models.references.drawing import Weights

Config = dict[str, Any]
FAMILIES = (
    baichuan,
    bailing_moe,
    chatglm,
    decilm,
    deepseek_moe,
    exaone,
    internlm2,
    jais,
    llama,
    minicpm,
    mpt,
    nemotron_nas,
    orion,
    qwen,
    refined_web,
    solar,
    stablelm_epoch,
    telechat2,
)


@dataclass(frozen=True)
class Reference:
    """One tiny model: `weights(config, seed)` and `forward(config, weights, input_ids)`.

    The forward pass takes one sequence of T token ids and returns logits [T, vocab], float32.
    """

    name: str
    config: Config
    weights: Callable[[Config, int], Weights]
    forward: Callable[[Config, Weights, list[int]], Tensor]

    @property
    def vocab_size(self) -> int:
        return int(self.config.get("vocab_size") or self.config["padded_vocab_size"])

    def logits(self, input_ids: list[int], *, seed: int = 0) -> Tensor:
        """Logits [T, vocab] of the weights of `seed`."""
        with torch.no_grad():
            return self.forward(self.config, self.weights(self.config, seed), input_ids)


REFERENCES: dict[str, Reference] = {
    name: Reference(name, config, family.weights, family.forward)
    for family in FAMILIES
    for name, config in family.CONFIGS.items()
}


def write(reference: Reference, directory: Path, *, seed: int = 0) -> Path:
    """config.json and model.safetensors in `directory`, which is made and returned."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(reference.config, indent=2))
    tensors = reference.weights(reference.config, seed)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def greedy(reference: Reference, prompt: list[int], n: int, *, seed: int = 0) -> list[int]:
    """The `n` likeliest next tokens, one by one, each from the whole sequence anew."""
    return [token for token, _ in greedy_steps(reference, prompt, n, seed=seed)]


def greedy_steps(
    reference: Reference, prompt: list[int], n: int, *, seed: int = 0
) -> Iterator[tuple[int, float]]:
    """Each likeliest token with its lead over the next, as a share of the largest logit."""
    tensors, tokens = reference.weights(reference.config, seed), list(prompt)
    for _ in range(n):
        with torch.no_grad():
            last = reference.forward(reference.config, tensors, tokens)[-1]
        best = last.topk(2)
        tokens.append(int(best.indices[0]))
        yield tokens[-1], float((best.values[0] - best.values[1]) / last.abs().max())


def clear_prompt(
    reference: Reference, length: int, n: int, *, seed: int = 0, lead: float = 1e-3
) -> list[int]:
    """A random prompt on which no greedy step of `n` is a tie that rounding could turn over."""
    choice = torch.Generator().manual_seed(seed)
    for _ in range(50):
        prompt = torch.randint(3, reference.vocab_size, (length,), generator=choice).tolist()
        if all(ahead >= lead for _, ahead in greedy_steps(reference, prompt, n, seed=seed)):
            return prompt
    raise AssertionError(f"{reference.name}: every prompt of {length} tokens meets a near tie")
