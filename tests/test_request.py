"""The one bounded schema: limits, messages, what a prompt must be."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedserve.errors import ContextLengthExceeded, RequestError
from pagedserve.limits import CEILING
from pagedserve.request import (
    BOUNDS,
    FLAGS,
    MAY_BE_NONE,
    Request,
    SamplingParams,
    check_prompt,
    check_vocabulary,
    choice_seed,
    plain_token_ids,
)
from tests.text.counting import lines_run

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


@pytest.mark.parametrize(
    "stop",
    [
        [""],
        ["x" * (CEILING.stop_chars + 1)],
        [5],
        ["x"] * (CEILING.stop_strings + 1),
        ["\ud800"],
        "\ud800",
        5,
        b"x",
        {"a": 1},
    ],
)
def test_bad_stops_are_refused(stop: Any) -> None:
    refused(stop=stop)


@pytest.mark.parametrize("ids", [["x"], [True], [1.0], [None], [1] * 129, "12", 5, {1: 2}])
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
        {"5": 1, "05": 2},
        {"5": 1, 5: 1},
        {"٥": 1},
        {"²": 1},
        {True: 1},
        {None: 1},
        {1.0: 1},
        [5],
        dict.fromkeys(range(CEILING.bias_entries + 1), 1),
    ],
)
def test_bad_biases_are_refused(bias: Any) -> None:
    refused(logit_bias=bias)


def test_min_tokens_may_not_be_above_max_tokens() -> None:
    refused(min_tokens=9, max_tokens=8)
    assert SamplingParams(min_tokens=9, max_tokens=None).min_tokens == 9


@pytest.mark.parametrize("name", FLAGS)
def test_flags_are_true_or_false(name: str) -> None:
    for value in (1, 0, None, "yes", []):
        assert "must be True or False" in refused(**{name: value}).message
    for value in (True, False):
        assert getattr(SamplingParams(**{name: value}), name) is value  # type: ignore[arg-type]


def test_numbers_of_another_library_become_plain_ones() -> None:
    """msgspec encodes only Python's own, and the engine decodes only what was encoded."""
    params = SamplingParams(
        temperature=np.float64(0.5),
        top_p=np.float32(0.5),  # type: ignore[arg-type]
        min_p=0,
        max_tokens=np.int64(7),  # type: ignore[arg-type]
        seed=np.uint8(3),  # type: ignore[arg-type]
        stop=np.array(["x"]),  # type: ignore[arg-type]
        stop_token_ids=np.array([5, 6]),  # type: ignore[arg-type]
        logit_bias={np.int32(5): np.float32(1.5)},  # type: ignore[dict-item]
    )
    plain = SamplingParams(
        temperature=0.5,
        top_p=0.5,
        max_tokens=7,
        seed=3,
        stop=["x"],
        stop_token_ids=[5, 6],
        logit_bias={5: 1.5},
    )
    assert msgspec.msgpack.encode(params) == msgspec.msgpack.encode(plain)
    assert type(params.temperature) is type(params.min_p) is float
    for name in ("temperature", "max_tokens"):
        for value in (np.True_, np.array([1, 2]), 1j, "1"):
            assert f"{name} must be" in refused(**{name: value}).message
    refused(max_tokens=np.float64(5))


def test_token_ids_of_any_library_become_plain_ints() -> None:
    one, two = np.int64(1), np.uint8(2)
    for ids in ([1, 2], (1, 2), range(1, 3), np.array([1, 2]), [one, two], iter([1, two])):
        ids = plain_token_ids("ids", ids)
        assert ids == [1, 2] and set(map(type, ids)) == {int}


@pytest.mark.parametrize(
    "given",
    [[1.5], [True], [None], ["1"], [[1]], "12", b"12", None, 5, {1: 2},
     np.array([1.0]), np.array([True]), np.array([[1]]), np.array(1)],
)  # fmt: skip
def test_what_is_no_token_id_is_refused_by_its_parameter(given: Any) -> None:
    with pytest.raises(RequestError, match="prompt_token_ids must be") as caught:
        plain_token_ids("prompt_token_ids", given)
    assert caught.value.param == "prompt_token_ids"


@pytest.mark.parametrize("token", [1.5, True, np.int64(5), None, "5"])
def test_a_prompt_of_anything_but_plain_ints_is_refused(token: Any) -> None:
    with pytest.raises(RequestError, match="prompt must be token ids"):
        check_prompt([5, token], SamplingParams(), **MODEL)


def test_a_million_token_ids_are_checked_in_no_time() -> None:
    ids = list(range(1_000_000))
    assert lines_run(lambda: plain_token_ids("ids", ids)) < 50  # none of them in Python
    assert plain_token_ids("ids", ids) == ids


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
