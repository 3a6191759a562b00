"""Prompts, lengths and arrivals are what was asked for, and the same for one seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pagedserve.commands.bench.work import RandomWork, arrivals, sharegpt
from pagedserve.errors import PagedServeError


def test_random_prompts_have_their_lengths_and_begin_alike() -> None:
    asks = RandomWork(20, 13, 5, prefix_len=7, vocab_size=50).asks(3)
    assert {len(ask.prompt) for ask in asks} == {20} and {ask.num_tokens for ask in asks} == {5}
    assert len({tuple(ask.prompt[:7]) for ask in asks}) == 1
    assert len({tuple(ask.prompt[7:]) for ask in asks}) == 20
    assert all(0 <= id < 50 for ask in asks for id in ask.prompt if isinstance(id, int))
    assert asks == RandomWork(20, 13, 5, prefix_len=7, vocab_size=50).asks(3)
    assert asks != RandomWork(20, 13, 5, prefix_len=7, vocab_size=50).asks(4)


def test_lengths_spread_around_what_was_given() -> None:
    asks = RandomWork(400, 20, 10, spread=0.5).asks(0)
    lengths, outputs = {len(ask.prompt) for ask in asks}, {ask.num_tokens for ask in asks}
    assert (min(lengths), max(lengths)) == (10, 30) and (min(outputs), max(outputs)) == (5, 15)


def test_arrivals_come_at_the_rate_or_all_at_once() -> None:
    times = arrivals(4000, 16.0, 0)
    assert times[0] == 0 and times == sorted(times)
    assert times[-1] == pytest.approx(4000 / 16, rel=0.05)
    assert arrivals(3, float("inf"), 0) == [0.0, 0.0, 0.0]


def turns(*said: tuple[str, Any]) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": what} for who, what in said]}


@pytest.fixture
def conversations(tmp_path: Path) -> Path:
    path = tmp_path / "conversations.json"
    kept = [turns(("human", f"why {n}?"), ("gpt", "so " * n)) for n in range(1, 6)]
    left = [turns(("gpt", "I begin")), turns(("human", "no answer")), turns(), {}, 7,
            turns(("system", "be kind"), ("human", "what?")), turns(("human", " "), ("gpt", "x")),
            turns(("human", None), ("gpt", "x"))]  # fmt: skip
    path.write_text(json.dumps(left + kept))
    return path


def test_questions_of_a_file_are_asked(conversations: Path) -> None:
    asks = sharegpt(conversations, 5, 0, encode=lambda text: [0] * len(text.split()))
    assert {(ask.prompt, ask.num_tokens) for ask in asks} == {(f"why {n}?", n) for n in range(1, 6)}
    fixed = sharegpt(conversations, 3, 1, output_len=9)
    assert [ask.num_tokens for ask in fixed] == [9, 9, 9]


def test_a_file_that_cannot_serve_says_why(conversations: Path, tmp_path: Path) -> None:
    with pytest.raises(PagedServeError, match="has 5 conversations .* and 6 prompts"):
        sharegpt(conversations, 6, 0, output_len=1)
    with pytest.raises(PagedServeError, match="cannot be read: No such file"):
        sharegpt(tmp_path / "none.json", 1, 0, output_len=1)
    conversations.write_text("[")
    with pytest.raises(PagedServeError, match="no valid JSON"):
        sharegpt(conversations, 1, 0, output_len=1)
    conversations.write_text("{}")
    with pytest.raises(PagedServeError, match="must hold a list"):
        sharegpt(conversations, 1, 0, output_len=1)
