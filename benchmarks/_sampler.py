"""From logits to tokens: ours without a sort, against torch's ops. 151,936 tokens, bf16 logits."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from _graphs import microseconds, read_terabytes_per_second, show
from torch import Tensor

from pagedserve.kernels import logprobs_gpu, sample, sample_gpu
from pagedserve.kernels.sample_gpu import Needs, SamplerRows, SamplerScratch
from pagedserve.worker.results import Results

VOCAB = 151936
ROWS = (1, 32, 256)
COPIES = 4
# name → (needs, temperature, top_k, top_p, min_p, standard deviation of the logits)
CASES = {
    "greedy": (Needs(False, False, False), 0.0, 0, 1.0, 0.0, 3.0),
    "temperature": (Needs(True, False, False), 0.8, 0, 1.0, 0.0, 3.0),
    "top_k 50, top_p 0.95": (Needs(True, True, False), 0.8, 50, 0.95, 0.0, 3.0),
    "top_p 0.95, steep": (Needs(True, True, False), 0.6, 0, 0.95, 0.0, 5.0),
    "min_p 0.05": (Needs(True, True, False), 1.0, 0, 1.0, 0.05, 3.0),
    "top_p 0.95, flat (search)": (Needs(True, True, False), 1.0, 0, 0.95, 0.0, 1.0),
    "penalties and top_k": (Needs(True, True, True), 0.8, 50, 0.95, 0.0, 3.0),
}


def run(*, quick: bool, sweep: bool) -> dict[str, Any]:
    """Microseconds; `floor`: one read of the logits."""
    rate = read_terabytes_per_second()
    found: dict[str, Any] = {"read_tb_per_s": round(rate, 3)}
    for n in ROWS[:1] if quick else ROWS:
        floor = n * VOCAB * 2 / rate / 1e6
        seen = torch.randint(0, VOCAB, (n, 1024), device="cuda")
        rows = SamplerRows.on(seen, biases=16, bans=16)
        rows.seeds.random_()
        scratch = SamplerScratch.on(seen.device, n, VOCAB)
        slots = torch.arange(n, device="cuda")
        positions = torch.full((n,), 1000, device="cuda")
        for name, (needs, temperature, top_k, top_p, min_p, spread) in CASES.items():
            many = [
                (torch.randn(n, VOCAB, device="cuda") * spread).bfloat16() for _ in range(COPIES)
            ]
            rows.numbers.copy_(
                torch.tensor([temperature, min_p, top_p, 1.0, 0.0, 0.0], device="cuda").expand(n, 6)
            )
            if needs.processed:
                rows.numbers[:, 3:] = torch.tensor([1.1, 0.2, 0.1], device="cuda")
            rows.counts[:, 0] = top_k

            time = microseconds(
                [
                    partial(sample_gpu.sample, x, slots, positions, rows, scratch, needs)
                    for x in many
                ],
                replays=5,
            )
            entry = {"us": round(time, 1), "floor": round(floor, 1)}
            if not needs.processed:
                by_torch = microseconds(
                    [partial(torch_way, many[0], rows, slots, positions, needs)], replays=3
                )
                entry["torch"] = round(by_torch, 1)
            found[f"{name} {n}"] = entry
            show(f"{name:26s} {n:4d} {entry}")
        kept = logprobs_gpu.LogprobScratch.on(seen.device, n, VOCAB)
        wanted = torch.full((n,), 20, dtype=torch.int32, device="cuda")
        chosen = torch.zeros(n, dtype=torch.int64, device="cuda")
        layout = Results(n, scored=True)
        out = layout.scores(torch.empty(layout.size, dtype=torch.int32, device="cuda"))
        time = microseconds(
            [partial(logprobs_gpu.logprobs, x, chosen, wanted, out, kept) for x in many]
        )
        found[f"logprobs 20 {n}"] = {"us": round(time, 1)}
        show(f"logprobs, top 20           {n:4d} {time:.1f}")
    return found


def torch_way(
    logits: Tensor, rows: SamplerRows, slots: Tensor, positions: Tensor, needs: Needs
) -> Tensor:
    """The same steps by torch's ops, as the sampler of a CPU takes them."""
    x = logits.float()
    if not needs.drawn:
        return x.argmax(-1)
    x = x / rows.numbers[slots, 0, None]
    if needs.filtered:
        floor = x.max(-1, keepdim=True).values + rows.numbers[slots, 1, None].log()
        x = x.masked_fill(x < floor, -torch.inf)
        values, order = torch.sort(x, dim=-1, descending=True, stable=True)
        rank = torch.arange(x.shape[-1], device=x.device)
        top_k = rows.counts[slots, 0, None]
        values = values.masked_fill((rank >= top_k) & (top_k > 0), -torch.inf)
        probs = values.softmax(-1)
        before = probs.cumsum(-1) - probs
        top_p = rows.numbers[slots, 2, None]
        values = values.masked_fill((before >= top_p) & (rank > 0), -torch.inf)
        x = torch.empty_like(x).scatter_(-1, order, values)
    return sample.race(x, rows.seeds[slots], positions)
