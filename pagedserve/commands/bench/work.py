"""What is asked in a benchmark: prompts, answer lengths and arrivals, all by one seed.

random     token ids: a beginning that all share, then random ones; lengths as given, or drawn
           around them
sharegpt   the first question of each conversation in a file, as text
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from pagedserve.errors import PagedServeError

DATASETS = ("random", "sharegpt")
ASKERS = ("human", "user")

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class Ask:
    """A prompt, as token ids or text, and the length of its answer in tokens."""

    prompt: list[int] | str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class RandomWork:
    """Lengths are in tokens. `spread` is the share by which they may differ from what is given."""

    num_prompts: int
    input_len: int
    output_len: int
    prefix_len: int = 0
    spread: float = 0.0
    vocab_size: int = 1000

    def asks(self, seed: int) -> list[Ask]:
        """All prompts."""
        choice = Random(seed)
        beginning = self._tokens(choice, self.prefix_len)
        return [
            Ask(
                beginning + self._tokens(choice, self._length(choice, self.input_len)),
                self._length(choice, self.output_len),
            )
            for _ in range(self.num_prompts)
        ]

    def _tokens(self, choice: Random, count: int) -> list[int]:
        return [choice.randrange(self.vocab_size) for _ in range(count)]

    def _length(self, choice: Random, around: int) -> int:
        low, high = round(around * (1 - self.spread)), round(around * (1 + self.spread))
        return choice.randint(max(1, low), max(1, high))


def asks_of(
    options: dict[str, Any],
    count: int,
    seed: int,
    *,
    encode: Encode | None,
) -> list[Ask]:
    """What the flags of `flags.add_work` describe. Raises PagedServeError where they do not fit."""
    path, name = options["dataset_path"], options["dataset_name"]
    if name == "random":
        if path is not None:
            raise PagedServeError("--dataset-path is for --dataset-name sharegpt")
        work = RandomWork(
            num_prompts=count,
            input_len=options["random_input_len"],
            output_len=options["random_output_len"],
            prefix_len=options["random_prefix_len"],
            spread=options["random_range_ratio"],
            vocab_size=options["random_vocab_size"],
        )
        return work.asks(seed)
    if path is None:
        raise PagedServeError("--dataset-name sharegpt needs --dataset-path FILE")
    output_len = options["sharegpt_output_len"]
    if output_len is None and encode is None:
        raise PagedServeError(
            "how long are the answers? Give --sharegpt-output-len N, or --tokenizer MODEL to count "
            "the tokens of the file's own"
        )
    return sharegpt(path, count, seed, output_len=output_len, encode=encode)


def counts_tokens(options: dict[str, Any]) -> bool:
    """Whether a tokenizer has to say how long the answers are."""
    return options["dataset_name"] == "sharegpt" and options["sharegpt_output_len"] is None


def facts_of(options: dict[str, Any]) -> dict[str, Any]:
    """The flags that describe the work, for the line."""
    beginning = options["dataset_name"] + "_"
    names = [name for name in options if name.startswith(beginning)]
    return {name: options[name] for name in ("dataset_name", "num_prompts", *names)}


def sharegpt(
    path: Path,
    num_prompts: int,
    seed: int,
    *,
    output_len: int | None = None,
    encode: Encode | None = None,
) -> list[Ask]:
    """Questions drawn from a file of conversations, in the form of ShareGPT.

    An answer is as long as `output_len` says, or as the file's own answer is in `encode`'s tokens.
    Raises PagedServeError for a file that cannot be read or has too few conversations.
    """
    assert output_len is not None or encode is not None, "no way to know the answers' lengths"
    pairs = [pair for each in conversations(path) if (pair := first_exchange(each)) is not None]
    if len(pairs) < num_prompts:
        raise PagedServeError(
            f"{path} has {len(pairs)} conversations that begin with a question and an answer, and "
            f"{num_prompts} prompts were asked for; lower --num-prompts"
        )
    chosen = Random(seed).sample(pairs, num_prompts)
    if output_len is not None:
        return [Ask(question, output_len) for question, _ in chosen]
    assert encode is not None
    return [Ask(question, max(1, len(encode(answer)))) for question, answer in chosen]


def conversations(path: Path) -> list[Any]:
    """The list in a file. Raises PagedServeError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PagedServeError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise PagedServeError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(found, list):
        raise PagedServeError(f"{path} must hold a list of conversations")
    return found


def first_exchange(conversation: Any) -> tuple[str, str] | None:
    """A conversation's first question and its answer; None where it does not begin so."""
    turns = conversation.get("conversations") if isinstance(conversation, dict) else None
    if not isinstance(turns, list) or len(turns) < 2:
        return None
    if not all(isinstance(turn, dict) for turn in turns[:2]):
        return None
    (asker, question), (answerer, answer) = (
        (turn.get("from"), turn.get("value")) for turn in turns[:2]
    )
    if asker not in ASKERS or answerer in (*ASKERS, "system"):
        return None
    if not isinstance(question, str) or not isinstance(answer, str) or not question.strip():
        return None
    return question, answer


def arrivals(count: int, rate: float, seed: int) -> list[float]:
    """Seconds at which requests are sent: a Poisson process; all at once for an infinite rate."""
    if rate == float("inf"):
        return [0.0] * count
    choice, now, times = Random(seed), 0.0, []
    for _ in range(count):
        times.append(now)
        now += choice.expovariate(rate)
    return times
