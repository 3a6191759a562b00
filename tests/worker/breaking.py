"""A model whose memory runs out at chosen moments, and an engine around a worker that has it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from pagedserve.config import Config
from pagedserve.engine.block_pool import BlockPool
from pagedserve.engine.loop import Engine
from pagedserve.engine.scheduler import Scheduler
from pagedserve.executor.local import LocalExecutor
from pagedserve.request import Request
from pagedserve.worker.start import Worker
from tests.engine.toy import Script
from tests.worker.soak import Load

Forward = Callable[..., torch.Tensor]


@dataclass
class Breaking:
    """Stands for `model`. `breaks` is asked with a step's token ids before and behind the layers,
    and before the head; an error that it gives is raised there."""

    model: Any
    breaks: Callable[[torch.Tensor], Exception | None]
    ids: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    num_broken: int = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def ask(self) -> None:
        error = self.breaks(self.ids)
        if error is not None:
            self.num_broken += 1
            raise error

    def forward(self, batch: Any, *rest: Any) -> torch.Tensor:
        self.ids = batch.input_ids
        self.ask()
        hidden = self.model.forward(batch, *rest)
        self.ask()
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        self.ask()
        return self.model.logits(hidden)

    def head_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        self.ask()
        return self.model.head_logits(hidden)


def now_and_then(share: float, seed: int = 0) -> Callable[[torch.Tensor], Exception | None]:
    """Memory is short for no reason of the step's."""
    choice = random.Random(seed)
    return lambda ids: torch.OutOfMemoryError("of it") if choice.random() < share else None


def poisoned(token: int) -> Callable[[torch.Tensor], Exception | None]:
    """A step that computes `token` cannot be."""
    return lambda ids: ValueError("poison") if bool((ids == token).any()) else None


def requests_of(worker: Worker, number: int, *, seed: int) -> list[Request]:
    """Random ones, some with log-probabilities."""
    load = Load(seed, worker.info.vocab_size, worker.info.max_model_len)
    made = [load.request() for _ in range(number)]
    for at, request in enumerate(made):
        if at % 3 == 0:
            params = request.params.replace(logprobs=2, prompt_logprobs=[None, 1][at % 2])
            made[at] = Request(
                request.id, request.prompt_token_ids, params, request.seed, 0, request.arrival
            )
    return made


def serve(
    worker: Worker, requests: list[Request], *, block_size: int, depth: int
) -> tuple[Script, Scheduler]:
    """Answers to requests that come two at a time."""
    info = worker.info
    scheduler = Scheduler(
        BlockPool(info.num_blocks),
        block_size=block_size,
        max_num_seqs=info.max_num_seqs,
        max_num_batched_tokens=info.max_num_batched_tokens,
        eos_token_ids=frozenset(info.eos_token_ids),
    )
    executor = LocalExecutor(Config(), lambda phase, detail: None)
    executor._worker = worker
    turns = {1 + at: requests[at : at + 2] for at in range(0, len(requests), 2)}
    script = Script(turns, {})
    Engine(scheduler, executor, script, depth=depth).run()  # type: ignore[arg-type]
    assert scheduler.idle and scheduler.pool.num_used == 0
    return script, scheduler
