"""The one bounded schema: limits, messages, what a prompt must be."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedserve.errors import ContextLengthExceeded, RequestError
from pagedserve.request import (
    BOUNDS,
    MAX_BIAS_ENTRIES,
    MAX_STOP_STRINGS,
    MAY_BE_NONE,
    Request,
    SamplingParams,
    check_prompt,
    check_vocabulary,
    choice_seed,
)

MODEL: dict[str, Any] = {"vocab_size": 100, "max_model_len": 10}


def refused(**fields: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**fields)
    assert caught.value.param in fields
    return caught.value


@pytest.mark.parametrize("name", BOUNDS)
def test_every_number_has_bounds_that_hold(name: str) -> None:
    kind, low, high = BOUNDS[name]
    others = {"max_tokens": None} if name == "min_tokens" else {}
    for value in (low, high):
        assert getattr(SamplingParams(**{name: kind(value), **others}), name) == value
    for value in (low - 1, high + 1, 10**400, -(10**400), "5", True, [1], {}):
        assert name in refused(**{name: value}).message
    if kind is int:
        refused(**{name: 0.5})
    for value in (float("nan"), float("inf"), -float("inf")):
        refused(**{name: value})
    if name in MAY_BE_NONE:
        assert getattr(SamplingParams(**{name: None}), name) is None
    else:
        refused(**{name: None})


def test_the_message_says_what_was_given_and_what_is_allowed() -> None:
    assert refused(temperature=-1).message == "temperature must be between 0.0 and 100.0, got -1"
    assert refused(n=10**5000).message.endswith("got a number far outside")


def test_one_stop_string_becomes_a_list() -> None:
    assert SamplingParams(stop="x").stop == ["x"]  # type: ignore[arg-type]
    assert SamplingParams(stop=None).stop == []  # type: ignore[arg-type]


@pytest.mark.parametrize("stop", [[""], ["x" * 257], [5], ["x"] * (MAX_STOP_STRINGS + 1)])
def test_bad_stops_are_refused(stop: Any) -> None:
    refused(stop=stop)


@pytest.mark.parametrize("ids", [["x"], [True], [1.0], [1] * 129])
def test_bad_stop_tokens_are_refused(ids: Any) -> None:
    refused(stop_token_ids=ids)


def test_bias_keys_may_be_strings_as_json_has_them() -> None:
    assert SamplingParams(logit_bias={"5": 1, 6: -2.5}).logit_bias == {5: 1.0, 6: -2.5}  # type: ignore[dict-item]
    assert SamplingParams(logit_bias=None).logit_bias == {}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "bias",
    [
        {"x": 1},
        {"5.0": 1},
        {"-5": 1},
        {5: "1"},
        {5: True},
        {5: 101},
        {5: float("nan")},
        {"9" * 5000: 1},
        [5],
        dict.fromkeys(range(MAX_BIAS_ENTRIES + 1), 1),
    ],
)
def test_bad_biases_are_refused(bias: Any) -> None:
    refused(logit_bias=bias)


def test_min_tokens_may_not_be_above_max_tokens() -> None:
    refused(min_tokens=9, max_tokens=8)
    assert SamplingParams(min_tokens=9, max_tokens=None).min_tokens == 9


def test_a_changed_copy_is_checked() -> None:
    with pytest.raises(RequestError):
        SamplingParams().replace(n=0)


def test_greedy_and_penalised_say_what_the_sampler_may_leave_out() -> None:
    assert SamplingParams(temperature=0).greedy and not SamplingParams().greedy
    assert not SamplingParams().penalised
    for name in ("presence_penalty", "frequency_penalty", "repetition_penalty"):
        assert SamplingParams(**{name: 0.5}).penalised  # type: ignore[arg-type]


def test_a_request_crosses_unchanged() -> None:
    params = SamplingParams(stop=["x"], logit_bias={5: 1.0}, seed=3, logprobs=2)
    request = Request(1, [1, 2, 3], params, 7, -1, 0.5)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=Request) == request


@pytest.mark.parametrize("token", [-1, 100, 10**30])
def test_tokens_outside_the_vocabulary_are_refused(token: int) -> None:
    with pytest.raises(RequestError, match=f"names token {token}; the vocabulary is 0 to 99"):
        check_vocabulary(SamplingParams(stop_token_ids=[token]), 100)
    with pytest.raises(RequestError, match=f"token id {token}"):
        check_prompt([5, token], SamplingParams(), **MODEL)


@pytest.mark.parametrize(
    ("length", "max_tokens", "param"),
    [(0, 1, "p"), (10, 1, "p"), (1000, None, "p"), (8, 3, "max_tokens")],
)
def test_what_does_not_fit_is_refused(length: int, max_tokens: int | None, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_prompt([5] * length, SamplingParams(max_tokens=max_tokens), **MODEL, param="p")
    assert caught.value.param == param
    assert isinstance(caught.value, ContextLengthExceeded) == (length > 0)


def test_max_tokens_is_settled() -> None:
    assert check_prompt([5] * 4, SamplingParams(max_tokens=None), **MODEL).max_tokens == 6
    assert check_prompt([5] * 4, SamplingParams(max_tokens=6), **MODEL).max_tokens == 6


@given(st.integers(-(2**63), 2**63 - 1), st.integers(1, 127))
def test_choices_have_seeds_of_their_own(seed: int, index: int) -> None:
    assert choice_seed(seed, 0) == seed
    assert 0 <= choice_seed(seed, index) < 2**63
    assert choice_seed(seed, index) == choice_seed(seed, index) != choice_seed(seed, index + 1)
