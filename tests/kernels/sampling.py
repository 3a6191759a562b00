"""Rows of logits and requests to draw from, and what is drawn by torch's sort, row by row."""

from __future__ import annotations

import torch
from torch import Tensor

from pagedserve.kernels import sample, sample_gpu
from pagedserve.kernels.logprobs_gpu import LogprobScratch, Scores, logprobs
from pagedserve.kernels.sample_gpu import SamplerRows, SamplerScratch
from pagedserve.worker.sampler import keep_top

SLOTS = 10
UNSET = -7
# By slot: temperature, min_p, top_p, top_k.
PARAMETERS = (
    (0.0, 0.0, 1.0, 0),
    (1.0, 0.0, 1.0, 0),
    (0.7, 0.1, 1.0, 0),
    (1.3, 0.0, 0.9, 5),
    (0.5, 0.02, 0.95, 20),
    (2.0, 0.3, 1.0, 3),
    (1.0, 0.0, 0.5, 0),
    (1.0, 0.0, 0.999, 0),
    (0.9, 0.0, 0.0, 0),
    (1.0, 0.0001, 1.0, 100),
)


def rows_for(vocab: int, device: torch.device, *, processed: bool) -> SamplerRows:
    """One of each kind of parameters; with `processed` penalties, biases and bans of all kinds."""
    seen = torch.randint(0, vocab, (SLOTS, 40), device=device)
    rows = SamplerRows.on(seen, biases=6, bans=4)
    parameters = torch.tensor(PARAMETERS, device=device)
    rows.numbers[:, :3] = parameters[:, :3]
    rows.counts[:, 0] = parameters[:, 3].int()
    rows.seeds.random_(-(2**63), 2**63 - 1)
    if processed:
        rows.numbers[:, 3] = torch.tensor([1, 1.2, 0.5, 1, 1, 2, 1, 0.9, 1, 1.1], device=device)
        rows.numbers[:, 4] = torch.tensor([0, 0.5, 0, 1, 0, 0, -1, 0.1, 0, 0.3], device=device)
        rows.numbers[:, 5] = torch.tensor([0.3, 0, 0, 0.1, 0, -0.2, 0, 0, 0, 1], device=device)
        rows.counts[:, 1:4] = torch.tensor(
            [[3 * slot, min(slot, 6, vocab), slot % 4] for slot in range(SLOTS)], device=device
        ).int()
        rows.counts[:, 4] = 30
        for slot in range(SLOTS):
            ids = torch.randperm(vocab, device=device)[:6].int()
            rows.bias_ids[slot, : len(ids)] = ids
        rows.bias_values.normal_()
        rows.ban_ids.random_(0, vocab)
    return rows


def drawn_by_sorting(
    logits: Tensor,
    slots: Tensor,
    positions: Tensor,
    rows: SamplerRows,
    masks: Tensor | None,
    mask_rows: Tensor | None,
) -> tuple[list[int], list[bool]]:
    """Tokens, and whether the row was finite."""
    tokens, finite = [], []
    for i, x in enumerate(logits.float()):
        slot, length = int(slots[i]), int(positions[i])
        x, number = x.clone(), rows.numbers[slot]
        top_k, num_prompt, num_bias, num_bans, until = rows.counts[slot].tolist()
        seen = rows.seen_ids[slot, :length]
        ids = seen.unique()
        x[ids] = torch.where(x[ids] > 0, x[ids] / number[3], x[ids] * number[3])
        count = torch.bincount(seen[num_prompt:], minlength=len(x))
        x -= number[5] * count
        x -= number[4] * (count > 0)
        if masks is not None and mask_rows is not None and mask_rows[i] >= 0:
            bit = torch.arange(32, device=x.device)
            allowed = (masks[mask_rows[i], :, None] >> bit) & 1
            x[allowed.flatten()[: len(x)] == 0] = -torch.inf
        x[rows.bias_ids[slot, :num_bias].long()] += rows.bias_values[slot, :num_bias]
        if length < until:
            x[rows.ban_ids[slot, :num_bans].long()] = -torch.inf
        finite.append(bool(x.max().isfinite()))
        if number[0] == 0:
            tokens.append(int(x.argmax()))
            continue
        x = x / number[0]
        if number[1] > 0:
            x = x.masked_fill(x < x.max() + number[1].log(), -torch.inf)
        kept = keep_top(x[None], torch.tensor([top_k], device=x.device), number[2:3])
        tokens.append(int(sample.race(kept, rows.seeds[slot, None], positions[i, None])))
    return tokens, finite


def check_sampling(
    device: torch.device,
    vocab: int,
    *,
    spread: float,
    dtype: torch.dtype,
    processed: bool,
    masked: bool = False,
) -> int:
    """Draws for every slot, the scratch poisoned; how many tokens differ from those of a sort."""
    logits = torch.randn(SLOTS, vocab + 8, device=device).mul_(spread).to(dtype)[:, :vocab]
    rows = rows_for(vocab, device, processed=processed)
    slots = torch.randperm(SLOTS, device=device)
    positions = torch.randint(1, 40, (SLOTS,), device=device)
    masks = mask_rows = None
    if masked:
        words = torch.randint(-(2**31), 2**31, (3, -(-vocab // 32)), device=device)
        masks = words.to(torch.int32)
        mask_rows = torch.randint(-1, 3, (SLOTS,), device=device).to(torch.int32)
    scratch = SamplerScratch.on(device, SLOTS, vocab)
    for part in (scratch.tile_floats, scratch.group_max, scratch.candidates, scratch.work):
        part.fill_(float("nan"))
    needs = sample_gpu.Needs(processed=processed or masked)
    got, finite = sample_gpu.sample(
        logits, slots, positions, rows, scratch, needs, masks=masks, mask_rows=mask_rows
    )
    tokens, wanted_finite = drawn_by_sorting(logits, slots, positions, rows, masks, mask_rows)
    assert finite.tolist() == wanted_finite
    good = [i for i, fine in enumerate(wanted_finite) if fine]
    return sum(int(got[i]) != tokens[i] for i in good)


def results_of(device: torch.device, rows: int, most: int) -> Scores:
    """Unset."""
    ids = torch.full((rows + 1, most), UNSET, dtype=torch.int32, device=device)
    floats = torch.full((rows + 1, most), torch.nan, device=device)
    return Scores(floats[rows, :rows], ids[rows, :rows], ids[:rows], floats[:rows])


def check_logprobs(device: torch.device, vocab: int, kind: str) -> None:
    """Logprob, rank and the likeliest, equal logits in the order of their ids."""
    logits = torch.randn(5, vocab, device=device) * 3
    if kind == "rounded":
        logits = logits.bfloat16()
    elif kind == "flat":
        logits.zero_()
        logits[:, vocab // 2] = 1
    elif kind == "few":
        logits[:, torch.randperm(vocab, device=device)[: vocab - 3]] = -torch.inf
    tokens = logits.argmax(-1) if kind == "few" else torch.randint(0, vocab, (5,), device=device)
    wanted = torch.tensor([0, 3, 5, -1, 20], dtype=torch.int32, device=device)
    scratch = LogprobScratch.on(device, 5, vocab)
    scratch.group_max.fill_(float("nan"))
    scratch.candidate_values.fill_(float("nan"))
    out = results_of(device, 5, 20)
    logprobs(logits, tokens, wanted, out, scratch)
    got, ranks, top_ids, top = out.logprobs, out.ranks, out.top_ids, out.top_logprobs
    expected = logits.float().log_softmax(-1)
    order = torch.sort(logits.float(), descending=True, stable=True).indices
    for i, k in enumerate(wanted.tolist()):
        if k < 0:
            assert got[i].isnan() and ranks[i] == UNSET and (top_ids[i] == UNSET).all()
            continue
        assert (top_ids[i, k:] == UNSET).all() and top[i, k:].isnan().all()
        k = min(k, vocab)
        assert torch.allclose(got[i], expected[i, tokens[i]], atol=1e-4)
        assert ranks[i] == (logits[i] > logits[i, tokens[i]]).sum() + 1
        assert torch.equal(top_ids[i, :k], order[i, :k])
        assert torch.allclose(top[i, :k], expected[i, order[i, :k]], atol=1e-4)
