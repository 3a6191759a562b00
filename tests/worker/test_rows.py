"""Permanent rows: what a step becomes on the device, against plain loops."""

import random

import torch

from pagedserve.request import SamplingParams
from pagedserve.step import BlockId, Join, Slot, Step
from pagedserve.worker.rows import Rows

CPU = torch.device("cpu")
PARAMS = SamplingParams()


def make(size: int, lengths: dict[int, int], counts: dict[int, int], r: random.Random):
    """A step in which slot s, of lengths[s] known tokens, computes its last counts[s]."""
    tokens = {slot: [r.randrange(1000) for _ in range(n)] for slot, n in lengths.items()}
    blocks = list(range(100))
    r.shuffle(blocks)
    tables = {slot: [blocks.pop() for _ in range(-(-n // size))] for slot, n in lengths.items()}
    grown = [(s, i, b) for s, table in tables.items() for i, b in enumerate(table)]
    slots = list(counts)
    r.shuffle(slots)
    step = Step(
        0,
        [Join(Slot(s), tokens[s], 1, PARAMS, 0) for s in lengths],
        [Slot(s) for s in slots],
        [lengths[s] - counts[s] for s in slots],
        [counts[s] for s in slots],
        [True] * len(slots),
        [Slot(s) for s, _, _ in grown],
        [i for _, i, _ in grown],
        [BlockId(b) for _, _, b in grown],
    )
    return step, tokens, tables


def test_batches_hold_what_the_step_says() -> None:
    for seed in range(40):
        r = random.Random(seed)
        size = r.choice([1, 3, 16])
        lengths = {slot: r.randint(1, 30) for slot in r.sample(range(9), r.randint(1, 6))}
        counts = {s: 1 if r.random() < 0.5 else r.randint(1, n) for s, n in lengths.items()}
        step, tokens, tables = make(size, lengths, counts, r)
        rows = Rows(9, 30, size, CPU)
        rows.apply(step)
        batch, order = rows.batch(step)
        assert sorted(order) == list(range(len(step.slots)))
        assert [step.counts[i] for i in order] == batch.counts
        assert batch.counts[: batch.num_decodes] == [1] * batch.num_decodes
        assert 1 not in batch.counts[batch.num_decodes :]
        ids, positions, mapping = [], [], []
        for i in order:
            slot, start = step.slots[i], step.starts[i]
            for position in range(start, start + step.counts[i]):
                ids.append(tokens[slot][position])
                positions.append(position)
                mapping.append(tables[slot][position // size] * size + position % size)
        assert batch.input_ids.tolist() == ids
        assert batch.positions.tolist() == positions
        assert batch.slot_mapping.tolist() == mapping
        assert batch.seq_lens.tolist() == batch.lens == [lengths[step.slots[i]] for i in order]
        starts = [sum(batch.counts[:i]) for i in range(len(order) + 1)]
        assert batch.query_start_loc.tolist() == starts
        for row, i in enumerate(order):
            table = tables[step.slots[i]]
            assert batch.block_tables[row, : len(table)].tolist() == table


def test_a_sampled_token_is_the_next_step_s_input_without_the_host() -> None:
    rows = Rows(2, 8, 4, CPU)
    step, _, _ = make(4, {1: 3}, {1: 3}, random.Random(0))
    rows.apply(step)
    rows.append(torch.tensor([1]), torch.tensor([3]), torch.tensor([77]))
    after = Step(1, [], [Slot(1)], [3], [1], [True], [], [], [])
    rows.apply(after)
    assert rows.batch(after)[0].input_ids.tolist() == [77]


def test_the_last_token_of_a_full_context_has_a_place() -> None:
    rows = Rows(1, 8, 4, CPU)
    rows.append(torch.tensor([0]), torch.tensor([8]), torch.tensor([5]))
    assert rows.token_ids[0, 8] == 5
