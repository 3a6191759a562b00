"""A step's inputs, made on the device from its permanent rows and one small message.

    message   int32, one copy a step:
              [rows, growths, 0, 0] [slots: R] [starts: R] [counts: R] [samples: R]
              [slot, index, block of a growth] …

    rows_kernel     growths into the block tables; query_start_loc, seq_lens, places of the last
                    tokens; positions to draw for, and the slots that what is drawn goes to
    tables_kernel   each row's block table out of its slot's
    tokens_kernel   input ids, positions and slot mapping of each token
    append_kernel   what was drawn behind its sequence, and beside each other for the host

Rows and tokens beyond the step's own compute on the scratch slot, the last of all, whose block
nobody else has: a graph of a fixed size serves smaller steps.

R rows of the message · G growths · S slots, the scratch slot included · W blocks of a table
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedserve.kernels.aot import Variant, older
from pagedserve.kernels.launch import dependent, launch_dependents, wait

HEADER = 4
TOKENS = 64  # of one program
TABLE = 1024  # entries of one program
GROWTHS = 256  # looked at together
ROWS = 256  # the same
MAX_ROWS = 4096  # of a step: one program holds them all


@dataclass(frozen=True, slots=True)
class Message:
    """How long the parts of a message are."""

    rows: int
    growths: int

    @property
    def size(self) -> int:
        return HEADER + 4 * self.rows + 3 * self.growths

    def used(self, growths: int) -> int:
        """Numbers of a message with so many growths."""
        return HEADER + 4 * self.rows + 3 * growths


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the kernels fill, for so many rows and tokens; all of it static memory.

    input_ids, positions, slot_mapping [T] int64; query_start_loc [R + 1], seq_lens [R],
    block_tables [R, W], last [R] int32: each row's last token; slots, places [R] int64: of the row
    and the position to draw for; targets [R] int64: the slot that gets it
    """

    input_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    last: Tensor
    slots: Tensor
    places: Tensor
    targets: Tensor

    @classmethod
    def on(cls, device: torch.device, rows: int, tokens: int, blocks: int) -> Inputs:
        """For at most `rows` rows and `tokens` tokens, of tables of `blocks` blocks."""

        def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        int32 = torch.int32
        return cls(
            empty(tokens),
            empty(tokens),
            empty(tokens),
            empty(rows + 1, dtype=int32),
            empty(rows, dtype=int32),
            empty(rows, blocks, dtype=int32),
            empty(rows, dtype=int32),
            empty(rows),
            empty(rows),
            empty(rows),
        )

    def cut(self, rows: int, tokens: int) -> Inputs:
        """The first of each: views."""
        return Inputs(
            self.input_ids[:tokens],
            self.positions[:tokens],
            self.slot_mapping[:tokens],
            self.query_start_loc[: rows + 1],
            self.seq_lens[:rows],
            self.block_tables[:rows],
            self.last[:rows],
            self.slots[:rows],
            self.places[:rows],
            self.targets[:rows],
        )


@triton.jit(do_not_specialize=["rows"])
def rows_kernel(
    message,
    tables,
    query_start_loc,
    seq_lens,
    last,
    slots,
    places,
    targets,
    message_rows,
    rows,
    scratch,
    table_stride,
    ROWS: tl.constexpr,
    GROWTHS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program. rows: of the graph, ≤ ROWS; scratch: the scratch slot."""
    launch_dependents(PDL)
    wait(PDL)
    real = tl.load(message)
    grown = tl.load(message + 1)
    base = message + 4 + 4 * message_rows
    for first in range(0, grown, GROWTHS):
        g = first + tl.arange(0, GROWTHS)
        there = g < grown
        slot = tl.load(base + 3 * g, mask=there, other=0).to(tl.int64)
        index = tl.load(base + 3 * g + 1, mask=there, other=0)
        block = tl.load(base + 3 * g + 2, mask=there, other=0)
        tl.store(tables + slot * table_stride + index, block, mask=there)
    r = tl.arange(0, ROWS)
    mine = r < real
    inside = r < rows
    at = message + 4 + r
    slot = tl.load(at, mask=mine, other=0)
    start = tl.load(at + message_rows, mask=mine, other=0)
    # A row that is none has one token in a graph of one-token rows and none in the others: the
    # message says which, by its count.
    count = tl.load(at + 2 * message_rows, mask=inside, other=0)
    samples = tl.load(at + 3 * message_rows, mask=mine, other=0)
    end = tl.cumsum(count, 0)
    tl.store(query_start_loc + r + 1, end, mask=inside)
    tl.store(query_start_loc + r, end - count, mask=(r == 0) & inside)
    length = tl.where(mine, start + count, count)
    tl.store(seq_lens + r, length, mask=inside)
    tl.store(last + r, tl.maximum(end - 1, 0), mask=inside)
    slot = tl.where(mine, slot, scratch)
    tl.store(slots + r, slot.to(tl.int64), mask=inside)
    tl.store(places + r, length.to(tl.int64), mask=inside)
    tl.store(targets + r, tl.where(samples > 0, slot, scratch).to(tl.int64), mask=inside)


@triton.jit
def tables_kernel(
    slots,
    seq_lens,
    tables,
    row_tables,
    table_stride,
    row_stride,
    PAGE: tl.constexpr,
    TABLE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Row program_id(0), entries program_id(1) · TABLE …: those that its context needs."""
    launch_dependents(PDL)
    wait(PDL)
    row = tl.program_id(0)
    first = tl.program_id(1) * TABLE
    blocks = tl.cdiv(tl.load(seq_lens + row), PAGE)
    if first < blocks:
        slot = tl.load(slots + row)
        e = first + tl.arange(0, TABLE)
        inside = e < blocks
        block = tl.load(tables + slot * table_stride + e, mask=inside)
        tl.store(row_tables + row.to(tl.int64) * row_stride + e, block, mask=inside)


@triton.jit(do_not_specialize=["rows", "tokens"])
def tokens_kernel(
    query_start_loc,
    seq_lens,
    slots,
    token_ids,
    tables,
    input_ids,
    positions,
    slot_mapping,
    rows,
    tokens,
    scratch_block,
    id_stride,
    table_stride,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Tokens program_id(0) · TOKENS … ROWS: how many are looked at together."""
    launch_dependents(PDL)
    wait(PDL)
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row = tl.zeros([TOKENS], tl.int32)
    for first in range(0, rows, ROWS):
        r = first + tl.arange(0, ROWS)
        ends = tl.load(query_start_loc + 1 + r, mask=r < rows, other=2147483647)
        row += tl.sum((ends[None, :] <= t[:, None]).to(tl.int32), 1)
    total = tl.load(query_start_loc + rows)
    mine = t < total
    row = tl.minimum(row, rows - 1)
    end = tl.load(query_start_loc + row + 1)
    position = (tl.load(seq_lens + row) - end + t).to(tl.int64)
    position = tl.where(mine, position, 0)
    slot = tl.load(slots + row)
    inside = t < tokens
    id = tl.load(token_ids + slot * id_stride + position, mask=mine, other=0)
    block = tl.load(tables + slot * table_stride + position // PAGE, mask=mine, other=0)
    block = tl.where(mine, block, scratch_block).to(tl.int64)
    offset = tl.where(mine, position % PAGE, t % PAGE)
    tl.store(input_ids + t, id, mask=inside)
    tl.store(positions + t, position, mask=inside)
    tl.store(slot_mapping + t, block * PAGE + offset, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def append_kernel(
    drawn,
    finite,
    targets,
    places,
    token_ids,
    results,
    rows,
    id_stride,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program. results: [2, rows] int32, tokens, then whether their logits were finite."""
    launch_dependents(PDL)
    wait(PDL)
    r = tl.arange(0, ROWS)
    inside = r < rows
    token = tl.load(drawn + r, mask=inside)
    target = tl.load(targets + r, mask=inside, other=0)
    place = tl.load(places + r, mask=inside, other=0)
    good = tl.load(finite + r, mask=inside).to(tl.int32)
    # Rows that draw nothing write to the scratch slot, at any of its positions.
    tl.store(token_ids + target * id_stride + place, token, mask=inside)
    tl.store(results + r, token.to(tl.int32), mask=inside)
    tl.store(results + rows + r, good, mask=inside)


def make_inputs(
    message: Tensor,
    layout: Message,
    inputs: Inputs,
    token_ids: Tensor,
    tables: Tensor,
    *,
    page: int,
    scratch_block: int,
) -> None:
    """Apply the message to `tables` and fill `inputs`.

    message: [layout.size] int32; token_ids: [S, L] int64; tables: [S, W] int32; the last slot is
    the scratch slot.
    """
    rows, tokens = inputs.seq_lens.shape[0], inputs.input_ids.shape[0]
    assert rows <= layout.rows and message.shape == (layout.size,)
    assert rows <= MAX_ROWS
    wide = triton.next_power_of_2(rows)
    rows_kernel[(1,)](
        message,
        tables,
        inputs.query_start_loc,
        inputs.seq_lens,
        inputs.last,
        inputs.slots,
        inputs.places,
        inputs.targets,
        layout.rows,
        rows,
        tables.shape[0] - 1,
        tables.stride(0),
        ROWS=wide,
        GROWTHS=GROWTHS,
        num_warps=warps(wide),
        **dependent(message),
    )
    tables_kernel[(rows, triton.cdiv(tables.shape[1], TABLE))](
        inputs.slots,
        inputs.seq_lens,
        tables,
        inputs.block_tables,
        tables.stride(0),
        inputs.block_tables.stride(0),
        PAGE=page,
        TABLE=TABLE,
        **dependent(message),
    )
    tokens_kernel[(triton.cdiv(tokens, TOKENS),)](
        inputs.query_start_loc,
        inputs.seq_lens,
        inputs.slots,
        token_ids,
        tables,
        inputs.input_ids,
        inputs.positions,
        inputs.slot_mapping,
        rows,
        tokens,
        scratch_block,
        token_ids.stride(0),
        tables.stride(0),
        PAGE=page,
        ROWS=min(wide, ROWS),
        TOKENS=TOKENS,
        **dependent(message),
    )


def append(
    drawn: Tensor, finite: Tensor, inputs: Inputs, token_ids: Tensor, results: Tensor
) -> None:
    """Write drawn tokens ([R] int64) behind their sequences, and into `results` [2, R] int32."""
    rows = drawn.shape[0]
    wide = triton.next_power_of_2(rows)
    append_kernel[(1,)](
        drawn,
        finite,
        inputs.targets,
        inputs.places,
        token_ids,
        results,
        rows,
        token_ids.stride(0),
        ROWS=wide,
        num_warps=warps(wide),
        **dependent(drawn),
    )


def warps(rows: int) -> int:
    """Of a program that holds so many rows: 8 of them a thread at most."""
    return max(4, min(rows // 256, 16))


INTS = {name: "*i32" for name in ("message", "tables", "row_tables", "query_start_loc")}
INTS |= {name: "*i32" for name in ("seq_lens", "last", "results")}
LONGS = {name: "*i64" for name in ("slots", "places", "targets", "token_ids", "input_ids")}
LONGS |= {name: "*i64" for name in ("positions", "slot_mapping", "drawn")}
SIZES = (
    "message_rows",
    "rows",
    "scratch",
    "table_stride",
    "row_stride",
    "tokens",
    "scratch_block",
    "id_stride",
)
TYPES: dict[str, str | None] = {**INTS, **LONGS, "finite": "*i1", **dict.fromkeys(SIZES, "i32")}


def variant(kernel: object, constants: dict[str, int]) -> Variant:
    """With the types of the arguments that `kernel` has, for the ROWS that it has."""
    names = kernel.arg_names  # type: ignore[attr-defined]
    types = {name: TYPES[name] for name in names if name in TYPES}
    label = f"step inputs, {kernel.fn.__name__}"  # type: ignore[attr-defined]
    rows = constants.get("ROWS", 1)
    return Variant(
        f"{label} of {rows} rows",
        kernel,
        types,
        constants | {"PDL": True},
        unaligned=SIZES,
        num_warps=warps(rows),
        capability=90,
    )


AOT = [
    variant(rows_kernel, {"ROWS": 256, "GROWTHS": GROWTHS}),
    variant(rows_kernel, {"ROWS": MAX_ROWS, "GROWTHS": GROWTHS}),
    variant(tables_kernel, {"PAGE": 16, "TABLE": TABLE}),
    variant(tokens_kernel, {"PAGE": 16, "ROWS": ROWS, "TOKENS": TOKENS}),
    variant(append_kernel, {"ROWS": 256}),
    variant(append_kernel, {"ROWS": MAX_ROWS}),
]
AOT += [older(each) for each in AOT]
