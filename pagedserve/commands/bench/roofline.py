"""The least time that a GPU needs for given tokens, by arithmetic alone.

    a step   max(weights / bandwidth, products / rate) + KV / bandwidth
             + activations / bandwidth + logits / bandwidth

Everything is counted from the model's spec, which is read from config.json. A measured time is
never below it, except by the error of the bandwidth: what is far above it has a reason.

C is the hidden size; "numbers" are elements of whatever dtype, bytes come with their size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pagedserve.errors import StartupError
from pagedserve.spec import Attn, DecoderSpec, Layer, Matmul, Mla, Mlp, Moe

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Chip:
    """A GPU's memory in bytes/s and its matrix products in bf16 in FLOP/s.

    `source`: "measured" is what our own kernels were seen to reach, "nominal" the data sheet's.
    """

    bytes_per_s: float
    flops_per_s: float
    source: str


CHIPS = {  # the end of the name that the driver gives
    "H200": Chip(4.4e12, 790e12, "measured"),
    "H100 80GB HBM3": Chip(3.35e12, 989e12, "nominal"),
    "H100 PCIe": Chip(2.04e12, 756e12, "nominal"),
    "A100-SXM4-80GB": Chip(2.039e12, 312e12, "nominal"),
    "A100-SXM4-40GB": Chip(1.555e12, 312e12, "nominal"),
    "L40S": Chip(0.864e12, 362e12, "nominal"),
    "L4": Chip(0.3e12, 121e12, "nominal"),
}


def chip_named(name: str | None) -> Chip | None:
    """The GPU of this name; None where no figures are known, as for a CPU."""
    return next((chip for end, chip in CHIPS.items() if (name or "").endswith(" " + end)), None)


def read_spec(directory: Path, overrides: dict[str, Any] | None = None) -> DecoderSpec | None:
    """The spec of a model directory; None for a model that has none (served by transformers)."""
    from pagedserve.models import config_json
    from pagedserve.models.architectures import spec_of

    try:
        return spec_of(config_json.read(directory, overrides))
    except StartupError:
        return None


@dataclass(frozen=True)
class Roofline:
    """A model on a chip, its weights and its cache held in items of so many bytes."""

    spec: DecoderSpec
    chip: Chip
    item_bytes: int = 2

    def decode_seconds(self, rows: int, context: float) -> float:
        """A step in which `rows` sequences of `context` tokens each grow by one."""
        return self._linear_seconds(rows, rows) + self._to_move(
            rows * (self.kv_numbers(context) + self._traffic + 2 * self.spec.vocab_size)
        )

    def prefill_seconds(self, length: int) -> float:
        """A prompt of `length` tokens, to its first output token."""
        moved = self._to_move(self.weight_numbers(length))
        return max(moved, self.prefill_flops(length) / self.chip.flops_per_s)

    def work_seconds(self, lengths: Iterable[tuple[int, int]], max_rows: int) -> float:
        """All requests (prompt, output) at once, at most `max_rows` of them together.

        There are as many steps as the longest answer has tokens, or as all tokens need.
        """
        pairs = list(lengths)
        prompts, outputs = sum(p for p, _ in pairs), sum(o for _, o in pairs)
        steps = max(max(o for _, o in pairs), -(-outputs // max_rows))
        products = 2.0 * (self.active * (prompts + outputs) + self.head * outputs)
        products += sum(self._attention_flops(prompt) for prompt, _ in pairs)
        linear = max(
            steps * self._to_move(self.weight_numbers(outputs / steps)),
            products / self.chip.flops_per_s,
        )
        cache = sum((output - 1) * self.kv_numbers(prompt + output / 2) for prompt, output in pairs)
        around = self._traffic * (prompts + outputs) + 2 * self.spec.vocab_size * outputs
        return linear + self._to_move(cache + around)

    def prefill_flops(self, length: int) -> float:
        """Products of a prompt of `length` tokens; of attention only the half that is seen."""
        return 2 * self.active * length + self._attention_flops(length) + 2 * self.head

    def weight_numbers(self, tokens: float) -> float:
        """Weights that a step of `tokens` reads; of experts as many as the tokens likely meet."""
        experts = sum(
            moe.experts * (1 - math.pow(1 - moe.top_k / moe.experts, tokens)) * self._expert(moe)
            for moe in self._mixtures
        )
        return self.dense + experts + self.head

    def kv_numbers(self, context: float) -> float:
        """Cached numbers that a sequence of `context` tokens reads in a step."""
        return sum(
            min(context, attn.window or context, attn.chunk or context) * attn.cache_width
            for attn in self.spec.cached()
        )

    @cached_property
    def dense(self) -> int:
        """Weights of all layers that every token multiplies."""
        return sum(layer_numbers(self.spec, layer) for layer in self.spec.layers)

    @cached_property
    def head(self) -> int:
        """Weights of the matrix that makes logits."""
        return self.spec.vocab_size * (self.spec.embed_size or self.spec.hidden_size)

    @cached_property
    def active(self) -> int:
        """Weights of all layers that one token multiplies, its experts included."""
        return self.dense + sum(moe.top_k * self._expert(moe) for moe in self._mixtures)

    @property
    def _mixtures(self) -> list[Moe]:
        return [layer.ffn for layer in self.spec.layers if isinstance(layer.ffn, Moe)]

    @cached_property
    def _traffic(self) -> int:
        """Numbers that one token writes and reads between the matrices of all layers."""
        return sum(traffic_numbers(self.spec, layer) for layer in self.spec.layers)

    def _expert(self, moe: Moe) -> int:
        return 3 * self.spec.hidden_size * moe.size

    def _linear_seconds(self, tokens: int, logits: int) -> float:
        flops = 2 * (self.active * tokens + self.head * logits)
        return max(self._to_move(self.weight_numbers(tokens)), flops / self.chip.flops_per_s)

    def _to_move(self, numbers: float) -> float:
        return numbers * self.item_bytes / self.chip.bytes_per_s

    def _attention_flops(self, length: int) -> float:
        """Scores and values of a prompt, over the keys that its queries see."""
        total = 0.0
        for layer in self.spec.layers:
            if isinstance(layer.attn, (Attn, Mla)):
                width, seen = score_width(layer.attn), min(length, window_of(layer.attn) or length)
                total += (seen * seen / 2 + (length - seen) * seen) * width * 2
        return total


def layer_numbers(spec: DecoderSpec, layer: Layer) -> int:
    """Weights of one layer's matrices, without its experts."""
    return attention_numbers(spec.hidden_size, layer.attn) + feed_forward_numbers(
        spec.hidden_size, layer.ffn
    )


def attention_numbers(hidden: int, attn: Attn | Mla | Matmul | None) -> int:
    """Weights of attention's matrices."""
    match attn:
        case Attn():
            keys = attn.kv_heads * (1 if attn.values_in_keys else 2)
            return hidden * attn.head_dim * (2 * attn.heads + keys)
        case Mla():
            query = attn.heads * (attn.nope_dim + attn.rope.dim)
            rank = attn.q_rank
            queries = hidden * query if rank is None else rank * (hidden + query)
            latent = hidden * (attn.latent_dim + attn.rope.dim)
            unfolded = attn.latent_dim * attn.heads * (attn.nope_dim + attn.value_dim)
            return queries + latent + unfolded + attn.heads * attn.value_dim * hidden
        case Matmul():
            return hidden * hidden
    return 0


def feed_forward_numbers(hidden: int, ffn: Mlp | Moe | Matmul | None) -> int:
    """Weights of a feed-forward's matrices; of a mixture, router and shared part only."""
    match ffn:
        case Mlp():
            return (3 if ffn.gated else 2) * hidden * ffn.size
        case Moe():
            return hidden * ffn.experts + feed_forward_numbers(hidden, ffn.shared)
        case Matmul():
            return hidden * hidden
    return 0


def traffic_numbers(spec: DecoderSpec, layer: Layer) -> int:
    """Numbers between one layer's matrices, a token: what they get and give, and both norms.

    A norm reads the residual and what is added to it, and writes both the sum and the result.
    """
    hidden, total = spec.hidden_size, 8 * spec.hidden_size
    match layer.attn:
        case Attn(heads=heads, kv_heads=kv_heads, head_dim=width):
            total += 2 * hidden + (2 * heads + 2 * kv_heads) * width
        case Mla() as mla:
            total += 2 * hidden + mla.heads * (mla.nope_dim + mla.rope.dim + mla.value_dim)
            total += mla.latent_dim + mla.rope.dim
        case Matmul():
            total += 2 * hidden
    match layer.ffn:
        case Mlp(size=size, gated=gated):
            total += 2 * hidden + (3 if gated else 2) * size
        case Moe(size=size, top_k=top_k):
            total += 2 * hidden + 3 * size * top_k
        case Matmul():
            total += 2 * hidden
    return total


def score_width(attn: Attn | Mla) -> int:
    """Multiplications of all heads for one query and one key, scores and values."""
    if isinstance(attn, Mla):
        return attn.heads * (attn.nope_dim + attn.rope.dim + attn.value_dim)
    return 2 * attn.heads * attn.head_dim


def window_of(attn: Attn | Mla) -> int | None:
    """Keys that a query sees at most; None is all."""
    return (attn.window or attn.chunk) if isinstance(attn, Attn) else None
