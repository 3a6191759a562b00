"""Sampling: exact distributions, keyed draws, processors, log-probabilities."""

import math

import pytest
import torch
from scipy import stats

from pagedserve.kernels.sample import exponentials, race
from pagedserve.request import SamplingParams
from pagedserve.step import Join, Slot
from pagedserve.worker.logits import Processors
from pagedserve.worker.rows import Rows
from pagedserve.worker.sampler import Sampler

CPU = torch.device("cpu")
VOCAB = 50
EOS = [3]


class Bench:
    """A sampler over `num_slots` rows whose sequences are set up by `join`."""

    def __init__(self, num_slots: int = 8, vocab: int = VOCAB):
        self.rows = Rows(num_slots, 64, 16, CPU)
        self.sampler = Sampler(num_slots, Processors(self.rows, vocab, EOS, CPU), CPU)
        self.lengths = [0] * num_slots

    def join(
        self, slot: int, *, prompt: list[int], output: list[int] = (), seed: int = 0, **params
    ):
        tokens = [*prompt, *output]
        join = Join(Slot(slot), tokens, len(prompt), SamplingParams(**params), seed)
        self.rows.token_ids[slot, : len(tokens)] = torch.tensor(tokens)
        self.lengths[slot] = len(tokens)
        self.sampler.set(join)
        return self

    def draw(self, logits: torch.Tensor, slots: list[int]):
        return self.sampler.sample(
            logits.clone(), [Slot(s) for s in slots], [self.lengths[s] for s in slots]
        )


def exact(logits: torch.Tensor, *, temperature=1.0, min_p=0.0, top_k=0, top_p=1.0) -> list[float]:
    """Probabilities by the definitions, in Python floats."""
    scaled = [x / temperature for x in logits.tolist()]
    highest = max(scaled)
    probs = [math.exp(x - highest) for x in scaled]
    probs = [p if p >= min_p else 0.0 for p in probs]
    order = sorted(range(len(probs)), key=lambda i: (-probs[i], i))
    if top_k > 0:
        probs = [p if i in order[:top_k] else 0.0 for i, p in enumerate(probs)]
    total, before = sum(probs), 0.0
    for rank, i in enumerate(order):
        mass = probs[i] / total
        if rank and before >= top_p:
            probs[i] = 0.0
        before += mass
    return [p / sum(probs) for p in probs]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.5},
        {"top_k": 7},
        {"top_p": 0.6},
        {"min_p": 0.1},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    ],
)
def test_samples_follow_the_exact_distribution(params: dict) -> None:
    torch.manual_seed(sum(map(ord, str(params))))
    logits = torch.randn(VOCAB) * 2
    expected = exact(logits, **params)
    slots, draws = 20, 20_000
    bench = Bench(num_slots=slots)
    counts = torch.zeros(VOCAB)
    for slot in range(slots):
        bench.join(slot, prompt=[1], seed=slot * 7919, **params)
        positions = list(range(draws // slots))
        rows = logits.repeat(len(positions), 1)
        sampled = bench.sampler.sample(rows, [Slot(slot)] * len(positions), positions)
        counts += sampled.token_ids.bincount(minlength=VOCAB)
    possible = [i for i, p in enumerate(expected) if p > 0]
    impossible = [i for i, p in enumerate(expected) if p == 0]
    assert counts[impossible].sum() == 0
    # Rare tokens are pooled, so that every cell expects enough draws for the test to hold.
    rare = [i for i in possible if expected[i] * draws < 8]
    cells = [[i] for i in possible if i not in rare] + ([rare] if rare else [])
    observed = [float(counts[cell].sum()) for cell in cells]
    wanted = [sum(expected[i] for i in cell) * draws for cell in cells]
    if len(cells) > 1:
        assert stats.chisquare(observed, wanted, sum_check=False).pvalue > 1e-3


def test_noise_is_exponential_and_independent_of_neighbours() -> None:
    noise = exponentials(torch.arange(200), torch.zeros(200, dtype=torch.int64), 500)
    assert stats.kstest(noise.flatten().numpy(), "expon").pvalue > 1e-3
    assert noise.min() > 0 and noise.isfinite().all()
    correlation = torch.corrcoef(torch.stack([noise[:, :-1].flatten(), noise[:, 1:].flatten()]))
    assert abs(correlation[0, 1]) < 0.01
    across = torch.corrcoef(torch.stack([noise[:-1].flatten(), noise[1:].flatten()]))
    assert abs(across[0, 1]) < 0.01


def test_a_draw_depends_on_seed_and_position_only() -> None:
    torch.manual_seed(1)
    logits = torch.randn(6, 1000)
    seeds = torch.tensor([5, -5, 2**63 - 1, -(2**63), 0, 7])
    positions = torch.tensor([0, 1, 2, 3, 1000, 5])
    together = race(logits, seeds, positions)
    alone = [race(logits[i : i + 1], seeds[i : i + 1], positions[i : i + 1]) for i in range(6)]
    assert together.tolist() == [int(token) for token in alone]
    assert not torch.equal(together, race(logits, seeds + 1, positions))
    assert not torch.equal(together, race(logits, seeds, positions + 1))


def test_greedy_rows_and_sampled_rows_share_a_batch() -> None:
    torch.manual_seed(2)
    logits = torch.randn(4, VOCAB)
    bench = Bench()
    for slot, temperature in enumerate([0.0, 1.0, 0.0, 0.7]):
        bench.join(slot, prompt=[1, 2], temperature=temperature, seed=slot)
    both = bench.draw(logits, [0, 1, 2, 3]).token_ids
    assert both[0] == logits[0].argmax() and both[2] == logits[2].argmax()
    for slot in (1, 3):
        assert both[slot] == bench.draw(logits[slot : slot + 1], [slot]).token_ids[0]


def test_top_p_zero_and_top_k_one_are_greedy() -> None:
    torch.manual_seed(3)
    logits = torch.randn(2, VOCAB)
    bench = Bench().join(0, prompt=[1], top_p=0.0).join(1, prompt=[1], top_k=1)
    assert torch.equal(bench.draw(logits, [0, 1]).token_ids, logits.argmax(-1))


def test_penalties_follow_their_formulas() -> None:
    torch.manual_seed(4)
    logits = torch.randn(1, VOCAB)
    prompt, output = [5, 5, 9], [7, 7, 9, 11]
    bench = Bench().join(
        0,
        prompt=prompt,
        output=output,
        temperature=0.0,
        presence_penalty=0.4,
        frequency_penalty=0.3,
        repetition_penalty=1.7,
    )
    expected = logits[0].clone()
    for token in set(prompt + output):
        value = expected[token]
        expected[token] = value / 1.7 if value > 0 else value * 1.7
    for token in set(output):
        expected[token] -= 0.3 * output.count(token) + 0.4
    scratch = logits.clone()
    bench.sampler._processors.apply(scratch, [Slot(0)], [7])
    torch.testing.assert_close(scratch[0], expected)


def test_penalties_do_not_see_what_an_earlier_owner_of_the_slot_wrote() -> None:
    bench = Bench().join(0, prompt=[1], output=[2] * 20, presence_penalty=2.0, temperature=0.0)
    bench.join(0, prompt=[1], output=[4], presence_penalty=2.0, temperature=0.0)
    logits = torch.zeros(1, VOCAB)
    bench.sampler._processors.apply(logits, [Slot(0)], [2])
    assert logits.nonzero().tolist() == [[0, 4]]


def test_bias_moves_the_choice_and_leaves_with_its_owner() -> None:
    logits = torch.zeros(1, VOCAB)
    bench = Bench().join(0, prompt=[1], temperature=0.0, logit_bias={17: 5.0, 2: -100.0})
    assert bench.draw(logits, [0]).token_ids.tolist() == [17]
    bench.join(0, prompt=[1], temperature=0.0)
    assert bench.draw(logits, [0]).token_ids.tolist() == [0]


def test_min_tokens_bans_every_end_until_it_is_reached() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 3], logits[0, 8], logits[0, 20] = 9.0, 8.0, 1.0
    bench = Bench()
    for written, token in ((0, 20), (1, 20), (2, 3)):
        bench.join(
            0,
            prompt=[1],
            output=[5] * written,
            temperature=0.0,
            min_tokens=2,
            stop_token_ids=[8],
        )
        assert bench.draw(logits, [0]).token_ids.tolist() == [token]


def test_logprobs_are_of_the_raw_logits_with_ranks() -> None:
    torch.manual_seed(5)
    logits = torch.randn(3, VOCAB)
    bench = (
        Bench()
        .join(0, prompt=[1], temperature=0.0, logprobs=2, logit_bias={6: 100.0})
        .join(1, prompt=[1], temperature=0.0)
        .join(2, prompt=[1], temperature=0.3, logprobs=0)
    )
    sampled = bench.draw(logits, [0, 1, 2])
    assert sampled.logprobs is not None
    first, second, third = sampled.logprobs.to_entries()
    expected = logits.log_softmax(-1)
    assert sampled.token_ids[0] == 6 and first is not None
    assert first.logprob == pytest.approx(float(expected[0, 6]))
    assert first.rank == 1 + int((logits[0] > logits[0, 6]).sum())
    assert first.top_ids == logits[0].topk(2).indices.tolist()
    assert first.top_logprobs == pytest.approx(expected[0].topk(2).values.tolist())
    assert second is None
    assert third is not None and third.top_ids == []


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_is_reported_alone(bad: float) -> None:
    logits = torch.zeros(2, VOCAB)
    logits[1, 9] = bad
    bench = Bench().join(0, prompt=[1]).join(1, prompt=[1])
    assert bench.draw(logits, [0, 1]).finite.tolist() == [True, False]
