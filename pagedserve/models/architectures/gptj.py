"""GPT-J and CodeGen: attention and feed-forward side by side, heads rotated in part."""

from __future__ import annotations

from pagedserve.errors import StartupError
from pagedserve.models.architectures.gpt2 import NAMES, attention, decoder, feed_forward
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import Attn, DecoderSpec, Layer, Rope

PARALLEL = {
    **{role: name for role, name in NAMES.items() if role not in ("positions", "qkv", "pre_ffn")},
    "out": "attn.out_proj",
    "up": "mlp.fc_in",
    "down": "mlp.fc_out",
}
SLICES = 4  # that q, k, v are stored in
OWN = {"q": "attn.q_proj", "k": "attn.k_proj", "v": "attn.v_proj"}


@arch("GPTJForCausalLM")
def gptj(c: Config) -> DecoderSpec:
    return side_by_side(c, rotated(c), {**PARALLEL, **OWN})


@arch("CodeGenForCausalLM")
def codegen(c: Config) -> DecoderSpec:
    if c["n_head"] % SLICES:
        raise StartupError(f"config.json: n_head {c['n_head']} is no multiple of {SLICES}")
    return side_by_side(c, rotated(c, packed="slices"), {**PARALLEL, "qkv": "attn.qkv_proj"})


def rotated(c: Config, packed: str = "no") -> Attn:
    """Pairs of neighbours rotate, in the first `rotary_dim` numbers of a head."""
    rope = Rope(10000.0, c["rotary_dim"], interleaved=True)
    return attention(c["n_embd"], c["n_head"], rope=rope, packed=packed)


def side_by_side(c: Config, attn: Attn, names: dict[str, str]) -> DecoderSpec:
    """Both."""
    hidden = c["n_embd"]
    ffn = feed_forward(c["activation_function"], c.get("n_inner") or 4 * hidden)
    return decoder(
        c,
        hidden,
        [Layer(attn, ffn, "parallel")] * c["n_layer"],
        max_positions=c["n_positions"],
        names=names,
        biases=frozenset({"final_norm", "pre_attn", "up", "down", "head"}),
        tied_head=c.get("tie_word_embeddings", False),
    )
