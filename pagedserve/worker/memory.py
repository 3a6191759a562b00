"""How memory is shared out: arithmetic from the bottom up, before anything of it is allocated.

    in all ─┬─ others        what is taken already, and what --gpu-memory-utilization leaves them
            ├─ weights
            ├─ rows          tokens, block tables, parameters and results of every sequence
            ├─ step          what the largest step allocates: activations, attention, logits
            ├─ graphs        the same once more, since graphs have memory of their own
            └─ KV cache      the rest, as whole blocks

What is permanent is counted, not estimated: the same code makes it on the meta device, which has
shapes and no memory. On a CPU the cache is a share of what is free, which leaves room for the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pagedserve.attention.base import AttentionBackend, Most
from pagedserve.config import Config
from pagedserve.device import Memory
from pagedserve.errors import StartupError
from pagedserve.limits import CEILING
from pagedserve.models.loading import LoadedModel
from pagedserve.spec import Attn, Layer, Mla, Mlp, ModelShape, Moe
from pagedserve.worker import kv_cache
from pagedserve.worker.prompt_logprobs import LOGITS_ROWS
from pagedserve.worker.sizes import Limits

GIB = 1 << 30
CPU_CACHE_SHARE = 0.25  # of the memory that is free: the machine is rarely ours alone
CPU_CACHE_BYTES = 4 << 30
LIBRARY_BYTES = 64 << 20  # cuBLAS's workspaces: of the steps' stream, and of the one that captures
PROMPT_BYTES = 16  # a logit of a prompt's token: raw, in fp32, its log-probability, and its rank
# What is found of a prompt's token, kept to the end of its step and of the next.
COLUMN_BYTES = 2 * (12 + 12 * CEILING.logprobs)
USUAL_CONTEXT = 8192  # tokens; while fewer fit the cache, steps are made smaller


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes by what they are for. `others`: left alone; `notes`: what was made to fit, for people.

    On a CPU only the cache is held in advance: `others` is what remains.
    """

    total: int
    others: int
    weights: int
    rows: int
    step: int
    graphs: int
    block_bytes: int
    block_size: int
    num_blocks: int
    scratch_blocks: int
    limits: Limits
    notes: tuple[str, ...] = ()

    @property
    def cache(self) -> int:
        """Bytes of the KV cache."""
        return (self.num_blocks + self.scratch_blocks) * self.block_bytes

    @property
    def num_tokens(self) -> int:
        """Tokens that the cache holds."""
        return self.num_blocks * self.block_size

    def items(self) -> dict[str, int]:
        """Everything, in order; the sum is the total."""
        parts = {
            "weights": self.weights,
            "rows": self.rows,
            "step": self.step,
            "graphs": self.graphs,
            "KV cache": self.cache,
        }
        used = sum(parts.values()) + self.others
        return {"others": self.others, **parts, "unused": max(0, self.total - used)}

    def line(self) -> str:
        """In one line, for people."""
        items = {name: size for name, size in self.items().items() if name != "unused"}
        parts = [f"{name} {shown(size)}" for name, size in items.items() if size > 0]
        return f"{', '.join(parts)}, of {shown(self.total)}"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a model is to be served: `memory` as it is with the weights loaded."""

    memory: Memory
    on_gpu: bool
    backend: AttentionBackend


def plan(config: Config, model: LoadedModel, place: Place, default: Limits) -> MemoryPlan:
    """What of `default` and of the model's context fits, where the configuration asks for nothing.

    Raises StartupError, with the arithmetic, where not even that does, or less than was asked for.
    """
    for limits in attempts(config, model, place, default):
        found = plan_for(config, model, place, limits)
        wanted = config.model.max_model_len or min(limits.max_model_len, USUAL_CONTEXT)
        if found.num_tokens >= wanted:
            break
    check(found, config)
    length = min(found.limits.max_model_len, found.num_tokens)
    notes = fitted(found, config, default)
    if length < found.limits.max_model_len:  # and with it the rows
        found = plan_for(config, model, place, replace(found.limits, max_model_len=length))
    return replace(found, notes=notes)


def attempts(config: Config, model: LoadedModel, place: Place, default: Limits) -> Iterator[Limits]:
    """From what is usual to the smallest steps that are worth it; what was asked for stays."""
    asked = config.scheduler
    limits = Limits(
        asked.max_num_seqs or default.max_num_seqs,
        asked.max_num_batched_tokens or default.max_num_batched_tokens,
        model.max_model_len,
    )
    yield limits
    if not place.on_gpu or asks_for_size(config):
        return
    while asked.max_num_batched_tokens is None and limits.max_num_batched_tokens > 512:
        limits = replace(limits, max_num_batched_tokens=limits.max_num_batched_tokens // 2)
        yield limits
    while asked.max_num_seqs is None and limits.max_num_seqs > 8:
        limits = replace(limits, max_num_seqs=limits.max_num_seqs // 2)
        yield limits


def asks_for_size(config: Config) -> bool:
    """Whether the size of the cache is not ours to choose."""
    cache = config.cache
    return cache.num_gpu_blocks_override is not None or cache.kv_cache_memory_bytes is not None


def plan_for(config: Config, model: LoadedModel, place: Place, limits: Limits) -> MemoryPlan:
    """With exactly these limits; there may be no block, and less than nothing left."""
    cache, block_size = config.cache, config.cache.block_size
    spec, memory = model.spec, place.memory
    rows = step = graphs = scratch = 0
    others = memory.total - memory.free - model.weight_bytes
    if place.on_gpu:
        rows, step, graphs = gpu_bytes(config, model, place.backend, limits)
        scratch = 1
        others += round(memory.total * (1 - cache.gpu_memory_utilization))
    block_bytes = kv_cache.block_bytes(spec, block_size, model.dtype)
    if cache.num_gpu_blocks_override is not None:
        blocks = cache.num_gpu_blocks_override
    elif cache.kv_cache_memory_bytes is not None:
        blocks = cache.kv_cache_memory_bytes // block_bytes
    elif place.on_gpu:
        usable = memory.total - others - model.weight_bytes - rows - step - graphs
        blocks = usable // block_bytes - scratch
    else:
        blocks = min(int(memory.free * CPU_CACHE_SHARE), CPU_CACHE_BYTES) // block_bytes
    if cache.num_gpu_blocks_override is None:
        # More than every sequence at full length could hold would never be used.
        full = limits.max_num_seqs * -(-limits.max_model_len // block_size)
        blocks = min(blocks, full)
    return MemoryPlan(
        total=memory.total,
        others=others,
        weights=model.weight_bytes,
        rows=rows,
        step=step,
        graphs=graphs,
        block_bytes=block_bytes,
        block_size=block_size,
        num_blocks=blocks,
        scratch_blocks=scratch,
        limits=limits,
    )


def check(found: MemoryPlan, config: Config) -> None:
    """Raise StartupError where there is no block, or a context that was asked for does not fit."""
    cache, asked = config.cache, config.model.max_model_len
    over = found.weights + found.others - found.total
    if over > 0:
        raise StartupError(
            f"no memory: the weights do not fit, {shown(over)} are missing ({found.line()}). Take "
            "a smaller model or a larger device, raise --gpu-memory-utilization, or give another "
            "--dtype."
        )
    wanted = asked or found.block_size
    missing = -(-wanted // found.block_size) - found.num_blocks
    if missing <= 0:
        return
    what = f"--max-model-len {asked}" if asked is not None else "a single block"
    lacks = f"{what} does not fit the KV cache: {shown(missing * found.block_bytes)} are missing"
    if cache.num_gpu_blocks_override is not None:
        way_out = "raise --num-gpu-blocks-override, or leave it out"
    elif cache.kv_cache_memory_bytes is not None:
        way_out = "raise --kv-cache-memory-bytes, or leave it out"
    else:
        way_out = (
            "free some memory, raise --gpu-memory-utilization, or lower --max-num-seqs or "
            "--max-num-batched-tokens"
        )
    if asked is not None and found.num_blocks > 0:
        way_out = f"ask for {found.num_tokens} at most, {way_out}"
    raise StartupError(f"no memory: {lacks} ({found.line()}). To go on, {way_out}.")


def fitted(found: MemoryPlan, config: Config, default: Limits) -> tuple[str, ...]:
    """What is less than usual, because memory is."""
    limits, asked, notes = found.limits, config.scheduler, []
    for name, usual, now in (
        ("max_num_batched_tokens", default.max_num_batched_tokens, limits.max_num_batched_tokens),
        ("max_num_seqs", default.max_num_seqs, limits.max_num_seqs),
    ):
        if getattr(asked, name) is None and now < usual:
            flag = "--" + name.replace("_", "-")
            notes.append(f"{flag} is {now} and not {usual}, so that the KV cache has room")
    if found.num_tokens < limits.max_model_len:
        notes.append(
            f"the context is {found.num_tokens} tokens and not {limits.max_model_len}, because the "
            "KV cache holds no more"
        )
    return tuple(notes)


# ── what a GPU holds ─────────────────────────────────────────────────────────────────────────────


def gpu_bytes(
    config: Config, model: LoadedModel, backend: AttentionBackend, limits: Limits
) -> tuple[int, int, int]:
    """Of rows, of the largest step, and of graphs."""
    spec, itemsize, block_size = model.spec, model.dtype.itemsize, config.cache.block_size
    in_stages = not backend.needs_lens
    if in_stages:
        from pagedserve.kernels.step_inputs import MAX_ROWS  # triton is there
        from pagedserve.worker.gpu_runner import permanent

        if limits.max_num_seqs > MAX_ROWS:
            raise StartupError(
                f"--max-num-seqs is {limits.max_num_seqs}, but a step on a GPU has {MAX_ROWS} rows "
                "at most",
                param="max_num_seqs",
            )
        meta = torch.device("meta")
        rows = permanent(limits, spec.vocab_size, model.eos_token_ids, block_size, meta)
        held, (num_rows, num_tokens) = tensor_bytes(rows), limits.sizes.largest()
    else:
        held = (limits.max_num_seqs + 1) * row_bytes(limits, block_size)
        num_rows, num_tokens = limits.max_num_seqs, limits.max_num_batched_tokens
    most = Most(num_rows, num_tokens, limits.max_model_len, block_size)
    step = num_tokens * activation_numbers(spec) * itemsize
    step += backend.workspace_bytes(spec.cached(), most, model.dtype)
    step += num_rows * spec.vocab_size * (4 if in_stages else SORTED_BYTES)
    prompts = LOGITS_ROWS * spec.vocab_size * PROMPT_BYTES + num_tokens * COLUMN_BYTES
    eager = config.scheduler.enforce_eager or not in_stages
    return held, step + prompts + LIBRARY_BYTES, 0 if eager else step


SORTED_BYTES = 24  # a logit that torch sorts: raw, processed, sorted, in order


def row_bytes(limits: Limits, block_size: int) -> int:
    """A sequence's tokens and block table, both int64 (`worker.rows`)."""
    return (limits.max_model_len + 1) * 8 + -(-limits.max_model_len // block_size) * 8


def activation_numbers(spec: ModelShape) -> int:
    """Numbers of one token that are alive at a time: a handful of hidden states, and what is within
    the widest layer."""
    kept = {layer.skip[0] for layer in spec.layers if layer.skip is not None}
    widest = max((width(layer, spec.hidden_size) for layer in spec.layers), default=0)
    return (6 + len(kept)) * spec.hidden_size + widest


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


def tensor_bytes(held: Any) -> int:
    """Of all tensors in dataclasses, other objects and containers, each once."""
    return sum({id(each): each.nbytes for each in tensors(held, set())}.values())


def tensors(held: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor within."""
    if id(held) in seen:
        return
    seen.add(id(held))
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, dict):
        yield from tensors(list(held.values()), seen)
    elif isinstance(held, list | tuple):
        for each in held:
            yield from tensors(each, seen)
    elif dataclasses.is_dataclass(held):
        for each in dataclasses.fields(held):
            yield from tensors(getattr(held, each.name), seen)
    elif type(held).__module__.startswith("pagedserve."):
        yield from tensors(vars(held), seen)


def shown(size: int) -> str:
    """Bytes for people."""
    if abs(size) < GIB:
        return f"{size / (1 << 20):.1f} MiB"
    return f"{size / GIB:.2f} GiB"
