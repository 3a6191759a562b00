"""Random tensors for tiny checkpoints: every value random, norms and biases too.

Scales are chosen so that attention is neither flat nor one-hot and that logits stay of order one:
a tensor that is forgotten, misplaced or transposed then moves the logits far beyond rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

Weights = dict[str, Tensor]


class Draw:
    """Draws float32 tensors one after the other; the same seed and order give the same values."""

    def __init__(self, seed: int) -> None:
        self.choice = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.choice)

    def matrix(self, out_features: int, in_features: int) -> Tensor:
        """A projection [out, in] that keeps the size of what it is given."""
        return self.normal(out_features, in_features) * in_features**-0.5

    def table(self, rows: int, width: int) -> Tensor:
        """An embedding [rows, width]."""
        return self.normal(rows, width)

    def scale(self, width: int) -> Tensor:
        """A norm's weight, around one."""
        return 1 + 0.3 * self.normal(width)

    def bias(self, width: int) -> Tensor:
        return 0.3 * self.normal(width)


def inverse_frequencies(dim: int, base: float = 10000.0) -> Tensor:
    """The buffer [dim / 2] that old checkpoints carry; its values follow from the config."""
    return base ** -(torch.arange(0, dim, 2).float() / dim)


def gated_layer(draw: Draw, weights: Weights, layer: str, hidden: int, ffn: int) -> None:
    """The two norms and the gated MLP of a pre-norm layer, under llama's names."""
    weights[f"{layer}.input_layernorm.weight"] = draw.scale(hidden)
    weights[f"{layer}.post_attention_layernorm.weight"] = draw.scale(hidden)
    weights[f"{layer}.mlp.gate_proj.weight"] = draw.matrix(ffn, hidden)
    weights[f"{layer}.mlp.up_proj.weight"] = draw.matrix(ffn, hidden)
    weights[f"{layer}.mlp.down_proj.weight"] = draw.matrix(hidden, ffn)


def projections(
    draw: Draw, weights: Weights, layer: str, hidden: int, *, q: int, kv: int, bias: bool = False
) -> None:
    """`self_attn.{q,k,v,o}_proj` of widths `q` and `kv`, under llama's names."""
    shapes = {"q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q)}
    for name, shape in shapes.items():
        weights[f"{layer}.self_attn.{name}_proj.weight"] = draw.matrix(*shape)
        if bias:
            weights[f"{layer}.self_attn.{name}_proj.bias"] = draw.bias(shape[0])
