"""A step's inputs, as the kernels make them, against a plain walk over its rows."""

from __future__ import annotations

import random

import pytest
import torch

from pagedserve.kernels import step_inputs
from pagedserve.kernels.step_inputs import HEADER, Inputs, Message, append, make_inputs

SLOTS, LENGTH, BLOCKS, PAGE = 9, 41, 11, 4
SCRATCH_BLOCK = 99


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_inputs_are_those_of_a_walk_over_the_rows(mixed: bool, seed: int) -> None:
    check(mixed, random.Random(seed), most_rows=6, num_slots=SLOTS)


def test_more_rows_than_are_looked_at_together(monkeypatch: pytest.MonkeyPatch) -> None:
    for at, together in enumerate((1, 2, 4)):
        monkeypatch.setattr(step_inputs, "ROWS", together)
        check(at != 1, random.Random(at), most_rows=9, num_slots=SLOTS)


def test_more_than_a_thousand_rows() -> None:
    check(True, random.Random(1), most_rows=1300, num_slots=1400)


def check(mixed: bool, choice: random.Random, *, most_rows: int, num_slots: int) -> None:
    token_ids = torch.randint(0, 1000, (num_slots + 1, LENGTH + 1))
    tables = torch.randint(0, 90, (num_slots + 1, BLOCKS), dtype=torch.int32)
    tables[-1] = SCRATCH_BLOCK
    real = choice.randint(most_rows * 4 // 5, most_rows) if most_rows > 6 else choice.randint(1, 6)
    slots = choice.sample(range(num_slots), real)
    starts = [choice.randint(0, LENGTH - 12) for _ in slots]
    counts = [choice.randint(1, 9) if mixed else 1 for _ in slots]
    samples = [choice.random() < 0.6 for _ in slots]
    grown = {
        (choice.randrange(num_slots), choice.randrange(BLOCKS))
        for _ in range(choice.choice([0, 5]))
    }
    rows = real + choice.randint(1, 3)
    tokens = sum(counts) + choice.randint(0, 70) if mixed else rows
    layout = Message(rows + 2, 16)
    message = torch.full((layout.size,), -7, dtype=torch.int32)
    message[0], message[1] = real, len(grown)
    columns = message[HEADER : layout.used(0)].view(4, -1)
    columns[2] = 0 if mixed else 1
    for at, column in enumerate((slots, starts, counts, samples)):
        columns[at, :real] = torch.tensor(column)
    triples = torch.tensor([[s, i, 200 + n] for n, (s, i) in enumerate(sorted(grown))])
    message[layout.used(0) : layout.used(len(grown))] = triples.flatten().int()
    inputs = Inputs.on(torch.device("cpu"), rows + 1, tokens + 5, BLOCKS).cut(rows, tokens)
    for each in (inputs.input_ids, inputs.positions, inputs.slot_mapping, inputs.seq_lens):
        each.fill_(-1)

    make_inputs(message, layout, inputs, token_ids, tables, page=PAGE, scratch_block=SCRATCH_BLOCK)

    for n, (slot, index) in enumerate(sorted(grown)):
        assert tables[slot, index] == 200 + n
    places = [(r, p) for r in range(real) for p in range(starts[r], starts[r] + counts[r])]
    ids = [int(token_ids[slots[r], p]) for r, p in places]
    mapping = [int(tables[slots[r], p // PAGE]) * PAGE + p % PAGE for r, p in places]
    assert inputs.input_ids[: len(ids)].tolist() == ids
    assert inputs.positions[: len(ids)].tolist() == [p for _, p in places]
    assert inputs.slot_mapping[: len(ids)].tolist() == mapping
    beyond = inputs.slot_mapping[len(ids) :]
    assert (beyond // PAGE == SCRATCH_BLOCK).all() and len(beyond) == tokens - len(ids)
    assert not inputs.positions[len(ids) :].any()
    padding = [0 if mixed else 1] * (rows - real)
    lengths = [start + count for start, count in zip(starts, counts, strict=True)] + padding
    assert inputs.seq_lens.tolist() == lengths
    ends = torch.tensor([0, *counts, *padding]).cumsum(0)
    assert inputs.query_start_loc.tolist() == ends.tolist()
    assert inputs.last[:real].tolist() == (ends[1 : real + 1] - 1).tolist()
    assert inputs.slots.tolist() == slots + [num_slots] * (rows - real)
    for r in range(real):
        needed = -(-lengths[r] // PAGE)
        assert torch.equal(inputs.block_tables[r, :needed], tables[slots[r], :needed])

    drawn = torch.randint(0, 1000, (rows,))
    finite = torch.rand(rows) < 0.5
    results = torch.zeros(2 * rows, dtype=torch.int32)
    before = token_ids.clone()
    append(drawn, finite, inputs, token_ids, results)
    for r in range(real):
        if samples[r]:
            before[slots[r], lengths[r]] = drawn[r]
    assert torch.equal(token_ids[:num_slots], before[:num_slots])
    assert results.tolist() == drawn.tolist() + finite.int().tolist()
