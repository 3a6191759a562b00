"""Permanent rows: what the device keeps of every active sequence, by slot.

    slot   token_ids [max_model_len + 1]        block_table [blocks of max_model_len]
      0    │ prompt ……… │ sampled … │ ·         │ 7 │ 3 │ 12 │ · │
      1    │ …                                  │ …

A Step only says what changed. Sampled tokens are written here by the device itself, so the next
step finds its input whether or not the CPU has seen it: that is all overlap needs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pagedserve.attention.batch import Batch
from pagedserve.step import Step


class Rows:
    """Token ids and block tables of `num_slots` sequences of at most `max_model_len` tokens."""

    def __init__(
        self, num_slots: int, max_model_len: int, block_size: int, device: torch.device
    ) -> None:
        blocks = -(-max_model_len // block_size)
        self.block_size = block_size
        self.device = device
        self.token_ids = torch.zeros(
            (num_slots, max_model_len + 1), dtype=torch.int64, device=device
        )
        self.block_tables = torch.zeros((num_slots, blocks), dtype=torch.int64, device=device)

    def apply(self, step: Step) -> None:
        """Take in what changed: joining sequences' tokens, and new blocks."""
        for join in step.joins:
            tokens = torch.tensor(join.token_ids, dtype=torch.int64)
            self.token_ids[join.slot, : len(tokens)] = tokens.to(self.device, non_blocking=True)
        if step.grown_slots:
            slots, index, blocks = self.upload(
                step.grown_slots, step.grown_index, step.grown_blocks
            )
            self.block_tables[slots, index] = blocks

    def upload(self, *columns: Sequence[int]) -> Tensor:
        """Columns of equal length as one [columns, length] int64 tensor: one copy to the device."""
        return torch.tensor(columns, dtype=torch.int64).to(self.device, non_blocking=True)

    def batch(self, step: Step) -> tuple[Batch, list[int]]:
        """The step's inputs on the device, and the order of its rows there.

        Rows that compute one token come first, so that attention takes them as one padded batch;
        `order[i]` is the step's index of the batch's row i.
        """
        order = list(range(len(step.slots)))
        num_decodes = step.counts.count(1)
        if num_decodes < len(order):
            order.sort(key=lambda row: step.counts[row] != 1)
        counts = [step.counts[row] for row in order]
        starts = [step.starts[row] for row in order]
        lens = [start + count for start, count in zip(starts, counts, strict=True)]
        slots, first = self.upload([step.slots[row] for row in order], starts)
        if num_decodes == len(order):
            token_slots, positions = slots, first
            query_start_loc = torch.arange(len(order) + 1, device=self.device)
        else:
            count = torch.tensor(counts).to(self.device, non_blocking=True)
            query_start_loc = torch.zeros(len(order) + 1, dtype=torch.int64, device=self.device)
            torch.cumsum(count, 0, out=query_start_loc[1:])
            num_tokens = sum(counts)
            token_slots = slots.repeat_interleave(count, output_size=num_tokens)
            offsets = first - query_start_loc[:-1]
            positions = torch.arange(num_tokens, device=self.device) + offsets.repeat_interleave(
                count, output_size=num_tokens
            )
        size = self.block_size
        blocks = self.block_tables[token_slots, positions // size]
        tables = self.block_tables[slots, : -(-max(lens) // size)]
        batch = Batch(
            input_ids=self.token_ids[token_slots, positions],
            positions=positions,
            slot_mapping=blocks * size + positions % size,
            block_tables=tables,
            seq_lens=self.upload(lens)[0],
            query_start_loc=query_start_loc,
            counts=counts,
            lens=lens,
            num_decodes=num_decodes,
            block_size=size,
        )
        return batch, order

    def append(self, slots: Tensor, positions: Tensor, token_ids: Tensor) -> None:
        """Write sampled tokens behind their sequences; all arguments [n] int64 on the device."""
        self.token_ids[slots, positions] = token_ids
