"""A toy GPU and a scripted API process: the whole engine without torch, sockets or time.

The toy's "model" is a hash of the whole prefix, so any lost, doubled or misplaced token changes
every token after it; its "KV cache" remembers which token of which position was written to each
slot of each block, so reading another sequence's memory is seen at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterable
from dataclasses import dataclass, field

from pagedserve.engine.block_pool import BlockPool
from pagedserve.engine.channel import Abort, ChannelClosed, Control, Failed, Outputs, Stats, Submit
from pagedserve.engine.loop import Engine
from pagedserve.engine.scheduler import Scheduler
from pagedserve.request import Request, SamplingParams
from pagedserve.step import Slot, Step, StepOutput, TokenLogprobs

VOCAB = 97
EOS = 7


def next_token(prefix: Iterable[int], seed: int) -> int:
    """The toy model: deterministic in the whole prefix and the seed."""
    text = ",".join(map(str, prefix)) + f";{seed}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest()) % VOCAB


def alone(request: Request) -> list[int]:
    """What a request writes when it has the machine to itself, computed without any engine."""
    tokens = list(request.prompt_token_ids)
    params = request.params
    ends = set(params.stop_token_ids) | (set() if params.ignore_eos else {EOS})
    for _ in range(params.max_tokens):
        tokens.append(next_token(tokens, request.seed))
        if tokens[-1] in ends:
            break
    return tokens[len(request.prompt_token_ids) :]


class ToyGpu:
    """An Executor. Launching computes at once, in order; `result` only hands over."""

    def __init__(self, num_slots: int, block_size: int):
        self.block_size = block_size
        self.tokens: list[list[int]] = [[] for _ in range(num_slots)]
        self.seeds = [0] * num_slots
        self.scored: dict[int, int] = {}  # slot → prompt length, where log-probabilities are wanted
        self.tables: list[dict[int, int]] = [{} for _ in range(num_slots)]
        self.cache: dict[tuple[int, int], tuple[int, int]] = {}
        self.max_tokens_in_a_step = 0
        self.num_mixed_steps = 0

    def launch(self, step: Step) -> StepOutput:
        for join in step.joins:
            self.tokens[join.slot] = list(join.token_ids)
            self.seeds[join.slot] = join.seed
            self.tables[join.slot] = {}
            self.scored.pop(join.slot, None)
            if join.params.prompt_logprobs is not None:
                self.scored[join.slot] = join.num_prompt
        grown = zip(step.grown_slots, step.grown_index, step.grown_blocks, strict=True)
        for slot, index, block in grown:
            self.tables[slot][index] = block
        rows = list(zip(step.slots, step.starts, step.counts, step.samples, strict=True))
        assert len(set(step.slots)) == len(rows), "a slot has two rows"
        for slot, start, count, _ in rows:
            for position in range(start, start + count):
                self.cache[self.where(slot, position)] = (self.tokens[slot][position], position)
        sampled = [
            self.draw(slot, start + count) for slot, start, count, samples in rows if samples
        ]
        self.max_tokens_in_a_step = max(self.max_tokens_in_a_step, step.num_tokens)
        self.num_mixed_steps += len(set(step.counts)) > 1
        prompt_logprobs = {
            Slot(slot): self.score(slot, start, count)
            for slot, start, count, _ in rows
            if slot in self.scored
        }
        return StepOutput(sampled, prompt_logprobs=prompt_logprobs)

    def score(self, slot: int, start: int, count: int) -> list[TokenLogprobs]:
        """The "log-probability" of a prompt token is the token itself."""
        end = min(start + count, self.scored[slot] - 1)
        return [TokenLogprobs(self.tokens[slot][at + 1], 1, [], []) for at in range(start, end)]

    def where(self, slot: int, position: int) -> tuple[int, int]:
        return self.tables[slot][position // self.block_size], position % self.block_size

    def draw(self, slot: int, length: int) -> int:
        tokens = self.tokens[slot]
        assert len(tokens) == length, "the row does not end where its tokens end"
        for position in range(length):
            assert self.cache[self.where(slot, position)] == (tokens[position], position), (
                "attention would read memory that is not this sequence's"
            )
        tokens.append(next_token(tokens, self.seeds[slot]))
        return tokens[-1]

    def result(self, ticket: StepOutput) -> StepOutput:
        return ticket


@dataclass
class Script:
    """A Channel to the engine that plays the API process: when to submit and abort what."""

    submits: dict[int, list[Request]]  # by turn of the loop
    aborts: dict[int, int]  # request id → abort once it has written so many tokens
    turn: int = 0
    written: dict[int, list[int]] = field(default_factory=dict)
    finished: dict[int, str] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    scores: dict[int, list[float]] = field(default_factory=dict)
    entries: dict[int, list[TokenLogprobs]] = field(default_factory=dict)  # of written tokens
    aborted: set[int] = field(default_factory=set)
    stats: Stats | None = None
    pending: bool = False

    def receive(self, timeout: float | None) -> list[object]:
        self.turn += 1
        messages: list[object] = []
        if self.turn in self.submits:
            messages.append(Submit(self.submits.pop(self.turn)))
        due = [
            id
            for id, after in self.aborts.items()
            if id not in self.aborted | self.finished.keys()
            and (id in self.written or after == 0)
            and len(self.written.get(id, ())) >= after
        ]
        if due:
            self.aborted.update(due)
            messages.append(Abort([*due, *due]))  # twice: it must not matter
        if timeout != 0.0 and not messages and not self.submits:
            messages.append(Control("shutdown"))
        return messages

    def send(self, message: object) -> None:
        match message:
            case Outputs():
                for id, token in zip(message.ids, message.token_ids, strict=True):
                    assert id not in self.finished, "a token after the finish"
                    self.written.setdefault(id, []).append(token)
                for id, entry in zip(message.ids, message.logprobs, strict=False):
                    if entry is not None:
                        self.entries.setdefault(id, []).append(entry)
                for id, entries in message.prompt_logprobs:
                    self.scores.setdefault(id, []).extend(entry.logprob for entry in entries)
                for finish in message.finished:
                    self.finished[finish.id] = finish.reason
            case Failed():
                self.failed[message.id] = message.message
            case Stats():
                self.stats = message


@dataclass
class Load:
    """A random load, and the machine it runs on."""

    seed: int
    num_blocks: int = 24
    block_size: int = 4
    budget: int = 12
    num_slots: int = 6
    abort_share: float = 0.15

    def requests(self) -> list[Request]:
        r = random.Random(self.seed)
        shared = [r.randrange(VOCAB) for _ in range(3 * self.block_size)]
        return [
            Request(
                id,
                (shared if r.random() < 0.5 else [])
                + [r.randrange(VOCAB) for _ in range(r.randint(1, 5 * self.block_size))],
                SamplingParams(
                    max_tokens=r.randint(1, 24),
                    stop_token_ids=[r.randrange(VOCAB)] if r.random() < 0.3 else [],
                    ignore_eos=r.random() < 0.2,
                    prompt_logprobs=0 if r.random() < 0.2 else None,
                ),
                seed=r.randrange(3),
                priority=r.choice([0, 0, 0, -1, 5]),
                arrival=float(id),
            )
            for id in range(1, r.randint(4, 16))
        ]

    def script(self) -> Script:
        r = random.Random(self.seed + 1000)
        submits: dict[int, list[Request]] = {}
        for request in self.requests():
            submits.setdefault(r.randint(1, 12), []).append(request)
        aborts = {
            request.id: r.randint(0, 6)
            for request in self.requests()
            if r.random() < self.abort_share
        }
        return Script(submits, aborts)

    def run(self, depth: int, *, caching: bool = True) -> tuple[Script, Scheduler, ToyGpu]:
        script = self.script()
        return script, *self.turn(script, depth, caching=caching)

    def turn(self, script: Script, depth: int, *, caching: bool = True) -> tuple[Scheduler, ToyGpu]:
        """An engine that lives until `script` ends it, by an order or by ChannelClosed."""
        scheduler = Scheduler(
            BlockPool(self.num_blocks, caching=caching),
            block_size=self.block_size,
            max_num_seqs=self.num_slots,
            max_num_batched_tokens=self.budget,
            eos_token_ids=frozenset({EOS}),
        )
        gpu = ToyGpu(self.num_slots, self.block_size)
        with contextlib.suppress(ChannelClosed):
            Engine(scheduler, gpu, script, depth=depth).run()  # type: ignore[arg-type]
        return scheduler, gpu
