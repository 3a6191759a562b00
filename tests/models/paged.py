"""Run a decoder as the worker does: several sequences, in chunks, over a shuffled paged cache."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pagedserve.attention import Batch, choose
from pagedserve.device import pick
from pagedserve.models.loading import LoadedModel
from pagedserve.worker import kv_cache


@dataclass
class PagedRun:
    """A cache full of NaN, and one shuffled block table a sequence."""

    model: LoadedModel
    block_size: int
    seed: int = 0
    kv_dtype: torch.dtype = torch.float32
    device: str = "cpu"
    tables: list[list[int]] = field(default_factory=list)

    def prefill_and_decode(
        self,
        sequences: list[list[int]],
        longest_chunk: int,
        decode_from: list[int] | None = None,
    ) -> list[Tensor]:
        """Logits of all positions of each sequence: [tokens, vocab]. Chunks of random size.

        `decode_from`: where each sequence's prompt ends, from where on it goes token by token.
        """
        ends = decode_from or [len(tokens) for tokens in sequences]
        choice = random.Random(self.seed)
        self.allocate(sequences, choice)
        done = [0] * len(sequences)
        logits: list[list[Tensor]] = [[] for _ in sequences]
        while any(at < len(tokens) for at, tokens in zip(done, sequences, strict=True)):
            rows = [i for i, tokens in enumerate(sequences) if done[i] < len(tokens)]
            rows = choice.sample(rows, choice.randint(1, len(rows)))
            size = {
                i: min(
                    choice.choice([1, 1, longest_chunk, choice.randint(1, longest_chunk)]),
                    max(ends[i] - done[i], 1),
                )
                for i in rows
            }
            rows.sort(key=lambda i: size[i] > 1)
            hidden = self.step(sequences, rows, [done[i] for i in rows], [size[i] for i in rows])
            out = self.model.decoder.logits(hidden).split([size[i] for i in rows])
            for i, row in zip(rows, out, strict=True):
                logits[i].append(row)
                done[i] += size[i]
        return [torch.cat(parts) for parts in logits]

    def allocate(self, sequences: list[list[int]], choice: random.Random) -> None:
        """Shuffled tables, and the cache in the designed layout."""
        spec, size = self.model.spec, self.block_size
        needed = [-(-len(tokens) // size) for tokens in sequences]
        free = list(range(sum(needed) + 5))
        choice.shuffle(free)
        self.tables = [[free.pop() for _ in range(n)] for n in needed]
        cached = spec.cached()
        self.num_blocks = sum(needed) + 5
        shape = (self.num_blocks, kv_cache.block_elements(cached, size, self.kv_dtype))
        cache = torch.full(shape, torch.nan, dtype=self.kv_dtype, device=self.device)
        self.kv = kv_cache.layer_views(cache, cached, size)
        self.backend = choose(pick(self.device), spec, self.kv_dtype, size)

    def step(
        self, sequences: list[list[int]], rows: list[int], starts: list[int], counts: list[int]
    ) -> Tensor:
        """One forward of `counts` tokens of each row."""
        batch = self.batch(sequences, rows, starts, counts)
        return self.model.decoder.forward(batch, self.kv, self.backend, self.backend.plan(batch))

    def batch(
        self, sequences: list[list[int]], rows: list[int], starts: list[int], counts: list[int]
    ) -> Batch:
        size = self.block_size
        spans = [range(a, a + n) for a, n in zip(starts, counts, strict=True)]
        lens = [span.stop for span in spans]
        width = max(-(-n // size) for n in lens)
        pad = next(b for b in range(self.num_blocks) if not any(b in t for t in self.tables))
        tables = [(self.tables[i] + [pad] * width)[:width] for i in rows]
        slots = [
            self.tables[i][p // size] * size + p % size
            for i, span in zip(rows, spans, strict=True)
            for p in span
        ]
        ids = [sequences[i][p] for i, span in zip(rows, spans, strict=True) for p in span]
        return Batch(
            input_ids=torch.tensor(ids, device=self.device),
            positions=torch.tensor([p for span in spans for p in span], device=self.device),
            slot_mapping=torch.tensor(slots, device=self.device),
            block_tables=torch.tensor(tables, device=self.device),
            seq_lens=torch.tensor(lens, device=self.device),
            query_start_loc=torch.tensor([0, *counts], device=self.device).cumsum(0),
            counts=counts,
            lens=lens,
            num_decodes=sum(n == 1 for n in counts),
            block_size=size,
        )
