"""A worker under random load: requests come, go and are aborted, and every token is kept."""

from __future__ import annotations

import random
from collections import deque

from pagedserve.engine.block_pool import BlockPool
from pagedserve.engine.scheduler import Scheduler
from pagedserve.request import Request, SamplingParams
from pagedserve.worker.start import Worker

Answers = dict[int, list[int]]
ARRIVALS = (0, 0, 0, 0, 0, 1, 1)


class Load:
    """Decides, by its own seed alone, what happens before each step."""

    def __init__(self, seed: int, vocab_size: int, longest: int):
        self.choice = random.Random(seed)
        self.vocab_size, self.longest = vocab_size, longest
        self.next_id = 0
        self.prefix = [self.choice.randrange(vocab_size) for _ in range(longest // 4)]

    def params(self) -> SamplingParams:
        choice = self.choice
        greedy = choice.random() < 0.4
        return SamplingParams(
            temperature=0.0 if greedy else choice.uniform(0.5, 1.5),
            top_k=choice.choice([0, 0, 5, 40]),
            top_p=choice.choice([1.0, 1.0, 0.9]),
            min_p=choice.choice([0.0, 0.0, 0.05]),
            repetition_penalty=choice.choice([1.0, 1.0, 1.2]),
            logit_bias={choice.randrange(self.vocab_size): 2.0} if choice.random() < 0.1 else {},
            max_tokens=choice.randint(1, self.longest // 2),
            ignore_eos=choice.random() < 0.7,
        )

    def request(self) -> Request:
        choice = self.choice
        length = choice.choice([1, 2, choice.randint(1, 30), choice.randint(1, self.longest // 3)])
        prompt = [choice.randrange(self.vocab_size) for _ in range(length)]
        if choice.random() < 0.3:
            prompt = self.prefix[: choice.randint(1, len(self.prefix))] + prompt
        self.next_id += 1
        params = self.params()
        room = self.longest - len(prompt)
        params = params.replace(max_tokens=min(params.max_tokens or 1, room))
        return Request(self.next_id, prompt, params, choice.getrandbits(60), 0, float(self.next_id))


def soak(worker: Worker, *, block_size: int, steps: int, depth: int, seed: int = 0) -> Answers:
    """Run `steps` steps, then what is left to the end. What each request wrote, also if aborted."""
    info = worker.info
    pool = BlockPool(info.num_blocks, caching=True)
    scheduler = Scheduler(
        pool,
        block_size=block_size,
        max_num_seqs=info.max_num_seqs,
        max_num_batched_tokens=info.max_num_batched_tokens,
        eos_token_ids=frozenset(info.eos_token_ids),
    )
    load = Load(seed, info.vocab_size, info.max_model_len)
    written: Answers = {}
    pending: deque = deque()
    launched = 0
    while launched < steps or not scheduler.idle or pending:
        if launched < steps:
            # What happens before a step depends on its number alone, so that runs compare.
            for _ in range(load.choice.choice(ARRIVALS)):
                request = load.request()
                scheduler.add(request)
                written[request.id] = []
            if load.next_id and load.choice.random() < 0.03:
                scheduler.abort(load.next_id - load.choice.randrange(min(load.next_id, 20)))
        while len(pending) >= depth:
            commit(scheduler, pending, written)
        step = scheduler.schedule()
        if step:
            pending.append((step, worker.launch(step)))
            launched += 1
        if pending and (not step or len(pending) >= depth):
            commit(scheduler, pending, written)
    assert pool.num_used == 0
    return written


def commit(scheduler: Scheduler, pending: deque, written: Answers) -> None:
    step, launched = pending.popleft()
    committed = scheduler.commit(step, launched.result())
    assert not committed.failed
    for id, token in zip(committed.ids, committed.token_ids, strict=True):
        written[id].append(token)
