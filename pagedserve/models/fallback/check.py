"""Is what the fallback computes what the class computes? Asked once at the start, of the weights.

Two sequences go through the paged path in chunks and then token by token, as requests do; each goes
through the class alone, with its eager attention and its own cache, in one piece. A state between
tokens that is not in attention's keys and values shows here, whatever the class calls it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pagedserve import attention
from pagedserve.attention.base import AttentionBackend
from pagedserve.attention.batch import Batch
from pagedserve.device import Device
from pagedserve.models.fallback import Fallback
from pagedserve.models.fallback.attention import PAGED, NotExpressible

LENGTHS = (37, 21)
# Tokens of each sequence in each step: chunks beside chunks, single tokens beside each other and
# alone, a chunk alone. A state that is lost between steps is lost most often to single tokens.
STEPS = ((5, 9), (8, 5), *((1, 1),) * 7, *((1, 0),) * 3, (14, 0))
BLOCK_SIZE = 16
TABLES = ((4, 1, 6), (2, 5))
NUM_BLOCKS = 8
# Of the logits of a position, relative to the reference's, as norms.
MAX_ERROR = 1e-4
# In 16 bits rounding alone makes errors, as large as those of a run in one piece, which has no
# state to lose; and the median counts, as it may also choose other experts for some tokens.
MAX_ERROR_16_BITS = 0.1
MAX_GROWTH_16_BITS = 3.0
LEAST_16_BITS = 0.01


def check(fallback: Fallback, device: Device) -> float:
    """The error, of which more than rounding raises NotExpressible."""
    sequences = random_sequences(fallback.model, fallback.spec.max_positions)
    want = [reference(fallback.model, tokens) for tokens in sequences]
    errors = compare(through_cache(fallback, sequences, device, STEPS), want)
    if fallback.dtype == torch.float32:
        error, limit = float(errors.max()), MAX_ERROR
    else:
        whole = compare(through_cache(fallback, sequences, device, (LENGTHS,)), want)
        error, limit = typical(errors), MAX_GROWTH_16_BITS * typical(whole) + LEAST_16_BITS
        limit = min(limit, MAX_ERROR_16_BITS)
    if not error <= limit:  # a NaN is none either
        raise NotExpressible(
            f"over the paged cache its logits differ from its own by {error:.1e} (more than "
            f"{limit:.0e})"
        )
    return error


def compare(got: list[Tensor], want: list[Tensor]) -> Tensor:
    """Errors of all positions that see a cache: those after the first step."""
    parts = zip(got, want, STEPS[0], strict=True)
    return torch.cat(
        [
            (g - w)[first:].norm(dim=-1) / w[first:].norm(dim=-1).clamp(min=1e-30)
            for g, w, first in parts
        ]
    )


def typical(errors: Tensor) -> float:
    """The median of all, or of those that came one by one, whichever is larger."""
    single = []
    for sequence, length in enumerate(LENGTHS):
        counts = [step[sequence] for step in STEPS]
        single += [counts[i] == 1 for i in range(1, len(STEPS)) for _ in range(counts[i])]
        assert sum(counts) == length
    alone = errors[torch.tensor(single[: len(errors)], device=errors.device)]
    return max(float(errors.median()), float(alone.median()))


def random_sequences(model: Any, max_positions: int) -> list[Tensor]:
    """Token ids that mean nothing special, [length] int64 each."""
    config = model.config.get_text_config()
    special = {
        value
        for each in (model.config, config)
        for key, value in vars(each).items()
        if key.endswith("token_id") or key.endswith("token_index")
        if isinstance(value, int)
    }
    plain = [i for i in range(min(config.vocab_size, 4096)) if i not in special]
    choice = torch.Generator().manual_seed(0)
    ids = torch.tensor(plain)
    return [
        ids[torch.randint(len(plain), (min(n, max_positions),), generator=choice)].to(model.device)
        for n in LENGTHS
    ]


def reference(model: Any, tokens: Tensor) -> Tensor:
    """The class's own logits, [length, vocab] float32."""
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            logits: Tensor = model(input_ids=tokens[None]).logits[0].float()
    finally:
        model.set_attn_implementation(PAGED)
    return logits


def through_cache(
    fallback: Fallback,
    sequences: list[Tensor],
    device: Device,
    steps: Sequence[tuple[int, int]],
) -> list[Tensor]:
    """The same in `steps` over a cache of a few blocks, which are not in order."""
    spec = fallback.spec
    backend = attention.choose(device, spec, fallback.dtype, BLOCK_SIZE)
    kv = [
        torch.zeros(
            (NUM_BLOCKS, 2, BLOCK_SIZE, attn.kv_heads, attn.head_dim),
            dtype=fallback.dtype,
            device=device.torch,
        )
        for attn in spec.attention
    ]
    logits: list[list[Tensor]] = [[] for _ in sequences]
    done = [0] * len(sequences)
    for step in steps:
        left = [len(tokens) - at for tokens, at in zip(sequences, done, strict=True)]
        counts = [min(count, rest) for count, rest in zip(step, left, strict=True)]
        rows = sorted((i for i in range(2) if counts[i]), key=lambda i: counts[i] > 1)
        if not rows:
            continue
        batch = make_batch(sequences, rows, done, counts)
        hidden = forward(fallback, batch, kv, backend)
        parts = torch.split(fallback.logits(hidden), [counts[i] for i in rows])
        for i, part in zip(rows, parts, strict=True):
            logits[i].append(part)
            done[i] += counts[i]
    return [torch.cat(parts) for parts in logits]


def forward(
    fallback: Fallback, batch: Batch, kv: list[Tensor], backend: AttentionBackend
) -> Tensor:
    """One step."""
    with torch.inference_mode():
        return fallback.forward(batch, kv, backend, backend.plan(batch))


def make_batch(
    sequences: list[Tensor], rows: list[int], starts: list[int], counts: list[int]
) -> Batch:
    """`counts[i]` tokens of each sequence i of `rows`, from `starts[i]` on."""
    where = sequences[0].device
    positions = [torch.arange(starts[i], starts[i] + counts[i], device=where) for i in rows]
    tables = torch.tensor([[*TABLES[i], 0, 0][:3] for i in rows], device=where)
    slots = [
        table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
        for table, position in zip(tables, positions, strict=True)
    ]
    lens = [starts[i] + counts[i] for i in rows]
    row_counts = [counts[i] for i in rows]
    return Batch(
        input_ids=torch.cat([sequences[i][p] for i, p in zip(rows, positions, strict=True)]),
        positions=torch.cat(positions),
        slot_mapping=torch.cat(slots),
        block_tables=tables,
        seq_lens=torch.tensor(lens, device=where),
        query_start_loc=torch.tensor([0, *row_counts], device=where).cumsum(0),
        counts=row_counts,
        lens=lens,
        num_decodes=sum(count == 1 for count in row_counts),
        block_size=BLOCK_SIZE,
    )
