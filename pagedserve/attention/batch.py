"""A Step on the device: what one forward reads.

Rows are sequences, tokens are theirs one after the other. Rows that compute one token come first,
so that they are one batched attention without being picked out.

    rows      0 … num_decodes - 1: one token each         the others: several
    tokens    0 … num_decodes - 1                         then each row's run
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class Batch:
    """Made by the worker, read by models and attention backends.

    input_ids         [num_tokens] int64
    positions         [num_tokens] int64
    slot_mapping      [num_tokens] int64: block · block_size + offset, where the token's KV goes
    block_tables      [num_rows, max_blocks of these rows] int64 or int32, padded with any valid id
    seq_lens          [num_rows]: tokens of context, this step's included
    query_start_loc   [num_rows + 1]: first token of each row
    counts, lens      tokens to compute and seq_lens of each row, on the host
    num_decodes       rows with count 1; they come first
    """

    input_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    block_tables: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    counts: list[int]
    lens: list[int]
    num_decodes: int
    block_size: int
