"""How much KV cache: arithmetic over what is free, before anything is allocated.

free memory (now, weights loaded)
├── workspace: activations and logits of the largest step
├── headroom: what --gpu-memory-utilization leaves to others
└── KV cache: the rest, as whole blocks
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pagedserve.config import CacheConfig
from pagedserve.errors import StartupError
from pagedserve.spec import Attn, Layer, Mla, Mlp, ModelShape, Moe
from pagedserve.worker.prompt_logprobs import LOGITS_ROWS

CPU_CACHE_SHARE = 0.25  # of the memory that is free: the machine is rarely ours alone
CPU_CACHE_BYTES = 4 << 30


@dataclass(frozen=True, slots=True)
class Limits:
    """The step sizes that memory has to hold."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int


def workspace_bytes(spec: ModelShape, limits: Limits, itemsize: int) -> int:
    """Upper estimate of what one step allocates beside weights and cache.

    Activations: a handful of [tokens, hidden] and the widest layer's own are alive at a time.
    Attention: torch may expand the keys and values of one sequence to all heads, in fp32.
    Logits: fp32, raw and processed and sorted copies for every sequence that samples.
    """
    widest = max(width(layer, spec.hidden_size) for layer in spec.layers)
    activations = limits.max_num_batched_tokens * (8 * spec.hidden_size + widest) * itemsize
    heads = max((attn.heads * attn.head_dim for attn in spec.cached()), default=0)
    attention = 2 * limits.max_model_len * heads * 4
    logits = limits.max_num_seqs * spec.vocab_size * 4 * 6
    return activations + attention + logits


def gpu_bytes(spec: ModelShape, limits: Limits, itemsize: int, block_size: int) -> int:
    """The same on a GPU, whose steps run op by op and as graphs, each with memory of its own, and
    which keeps every sequence's tokens (int64) and block table (int32, twice) in permanent rows.

    Log-probabilities of a prompt are taken op by op, of LOGITS_ROWS tokens at a time however few
    sequences there are. On a CPU its share of what is free leaves room for them.
    """
    length = limits.max_model_len + 1
    row = length * 8 + -(-length // block_size) * 4 * 2
    prompts = replace(limits, max_num_seqs=max(limits.max_num_seqs, LOGITS_ROWS))
    steps = sum(workspace_bytes(spec, each, itemsize) for each in (limits, prompts))
    return steps + (limits.max_num_seqs + 1) * row


def width(layer: Layer, hidden_size: int) -> int:
    """Numbers a token that are alive in the widest part of a layer."""
    attn, ffn = layer.attn, layer.ffn
    widths = [0]
    if isinstance(ffn, Mlp):
        widths.append(3 * ffn.size)
    if isinstance(ffn, Moe):
        shared = 3 * ffn.shared.size if ffn.shared else 0
        widths.append(ffn.top_k * (3 * ffn.size + 2 * hidden_size) + shared + 4 * ffn.experts)
    if isinstance(attn, Attn):
        widths.append(3 * (attn.heads + 2 * attn.kv_heads) * attn.head_dim)
    if isinstance(attn, Mla):
        widths.append(4 * attn.heads * (attn.latent_dim + attn.nope_dim + attn.rope.dim))
    return max(widths)


def plan_blocks(
    cache: CacheConfig,
    *,
    block_bytes: int,
    workspace: int,
    free_bytes: int,
    total_bytes: int,
    on_gpu: bool,
    limits: Limits,
) -> int:
    """Number of KV blocks. Raises StartupError, with the arithmetic, where there is no room."""
    if cache.num_gpu_blocks_override is not None:
        return cache.num_gpu_blocks_override
    if cache.kv_cache_memory_bytes is not None:
        usable = cache.kv_cache_memory_bytes
    elif on_gpu:
        usable = free_bytes - workspace - int(total_bytes * (1 - cache.gpu_memory_utilization))
    else:
        usable = min(int(free_bytes * CPU_CACHE_SHARE), CPU_CACHE_BYTES)
    # More than every sequence at full length could hold would never be used.
    full = limits.max_num_seqs * -(-limits.max_model_len // cache.block_size)
    blocks = min(usable // block_bytes, full)
    if blocks < 1:
        raise StartupError(
            f"no memory for a KV cache: {free_bytes >> 20} MiB free of {total_bytes >> 20} MiB, "
            f"{workspace >> 20} MiB of workspace, {block_bytes >> 10} KiB a block. Free some "
            "memory, raise --gpu-memory-utilization, or lower --max-num-seqs or "
            "--max-num-batched-tokens."
        )
    return int(blocks)
