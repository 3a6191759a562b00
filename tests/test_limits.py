"""The table of limits: what may be set, and that the documentation shows it as it is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from pagedserve.config import Config
from pagedserve.errors import RequestError, StartupError
from pagedserve.limits import CEILING, Limits
from pagedserve.request import (
    SamplingParams,
    check_num_sequences,
    check_prompt_tokens,
    check_within,
    most_tokens,
)

NAMES = [each.name for each in dataclasses.fields(Limits)]
DOCS = Path(__file__).parents[1] / "docs" / "api.md"

# One more than a limit allows: limit, field of SamplingParams, its value for a limit of 3.
ONE_MORE: list[tuple[str, str, Any]] = [
    ("n", "n", 4),
    ("logprobs", "logprobs", 4),
    ("logprobs", "prompt_logprobs", 4),
    ("stop_strings", "stop", ["a", "b", "c", "d"]),
    ("stop_chars", "stop", "four"),
    ("stop_token_ids", "stop_token_ids", [1, 2, 3, 4]),
    ("bias_entries", "logit_bias", {"1": 1, "2": 1, "3": 1, "4": 1}),
]


@pytest.mark.parametrize("name", NAMES)
def test_every_limit_can_be_set_within_its_bounds(name: str) -> None:
    (field,) = (each for each in dataclasses.fields(Limits) if each.name == name)
    low, high = field.metadata["lowest"], field.metadata["highest"]
    assert low <= field.default <= high
    for value in (low, high):
        assert getattr(Limits.of({name: value}), name) == value
    for bad in (low - 1, high + 1, 1.5, "7", None, True, [1]):
        with pytest.raises(StartupError, match=f"--limits: {name} must be an integer between"):
            Limits.of({name: bad})


def test_what_is_no_limit_is_named_and_the_others_are_listed() -> None:
    with pytest.raises(StartupError, match="there is no limit 'm'; there are n, prompts"):
        Config.from_options({"limits": {"m": 1}})
    with pytest.raises(StartupError, match="--limits must be a JSON object"):
        Config.from_options({"limits": "[1]"})
    assert Limits.of(Config.from_options({"limits": '{"n": 7}'}).server.limits).n == 7
    assert Limits.of(None) == Limits() == Limits.of({})


@pytest.mark.parametrize(("name", "param", "value"), ONE_MORE)
def test_one_more_than_a_limit_is_refused_by_its_parameter(
    name: str, param: str, value: Any
) -> None:
    with pytest.raises(RequestError, match="3") as caught:
        check_within({param: value}, Limits.of({name: 3}))
    assert caught.value.param == param
    check_within({param: value}, Limits.of({name: 4}))
    SamplingParams(**{param: value})  # the engine has room for it


def test_sequences_and_prompts_of_a_request_are_counted_together() -> None:
    limits = Limits.of({"sequences": 6, "prompt_tokens": 100})
    check_num_sequences(6, limits)
    check_prompt_tokens(100, limits, param="prompt")
    with pytest.raises(RequestError, match="prompts times n is 7; at most 6") as caught:
        check_num_sequences(7, limits)
    assert caught.value.param == "n"
    with pytest.raises(RequestError, match="more than 100") as caught:
        check_prompt_tokens(101, limits, param="messages")
    assert caught.value.param == "messages"


def test_sequences_share_the_tokens_that_a_request_may_be_answered_with() -> None:
    limits = Limits.of({"answer_tokens": 100, "logprob_entries": 60})
    assert most_tokens(SamplingParams(max_tokens=None), 3, limits) == 33
    assert most_tokens(SamplingParams(max_tokens=33), 3, limits) == 33
    assert most_tokens(SamplingParams(max_tokens=4, logprobs=4), 3, limits) == 4
    for params, num_sequences in (
        (SamplingParams(max_tokens=34), 3),
        (SamplingParams(max_tokens=5, logprobs=4), 3),
        (SamplingParams(max_tokens=None), 101),
    ):
        with pytest.raises(RequestError, match="max_tokens may be") as caught:
            most_tokens(params, num_sequences, limits)
        assert caught.value.param == "max_tokens"


def test_the_defaults_let_everybody_fill_a_long_context() -> None:
    limits = Limits()
    assert most_tokens(SamplingParams(n=128, max_tokens=None), 128, limits) == 128 << 10
    assert most_tokens(SamplingParams(logprobs=20, max_tokens=None), 1, limits) > 128 << 10


def test_the_documentation_has_the_table_that_holds() -> None:
    text = DOCS.read_text(encoding="utf-8")
    rows = [
        f"| `{each.name}` | {each.default:,} | {each.metadata['lowest']:,} to "
        f"{each.metadata['highest']:,} | {each.metadata['meaning']} |"
        for each in dataclasses.fields(Limits)
    ]
    assert "\n".join(rows) in text
    assert Limits(**{name: getattr(CEILING, name) for name in NAMES}) == CEILING
