"""Engine tokens to Deltas: ends, reasons, offsets, what is counted and what is shown."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedserve.request import SamplingParams
from pagedserve.step import TokenLogprobs
from pagedserve.text.deltas import Delta, TextStream
from pagedserve.text.tokenizer import Tokenizer
from tests.text.building import BOS, EOS, byte_level

TOKENIZER = Tokenizer(byte_level(), {"bos_token": BOS, "eos_token": EOS})
EOS_ID = TOKENIZER.backend.token_to_id(EOS)


def run(
    text: str, *, eos: bool = False, stop_token: int | None = None, **params: Any
) -> tuple[list[Delta], TextStream]:
    """Push the tokens of `text`, the last one (or an end token after it) with the finish."""
    ids = TOKENIZER.encode(text, False)
    if eos:
        ids.append(EOS_ID)
        stop_token = EOS_ID
    reason = "stop" if stop_token is not None else "length"
    stream = TextStream(TOKENIZER, SamplingParams(**params))
    deltas = []
    for at, id in enumerate(ids):
        last = at == len(ids) - 1
        deltas.append(
            stream.push(
                id,
                TokenLogprobs(-1.0, 1, [id], [-1.0]) if params.get("logprobs") else None,
                reason if last else None,
                stop_token if last else None,
            )
        )
        if deltas[-1].finish_reason is not None:
            break
    return deltas, stream


def shown(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def test_an_end_token_is_counted_and_not_shown() -> None:
    deltas, stream = run("hello world", eos=True, skip_special_tokens=False)
    assert shown(deltas) == "hello world"
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", None)
    assert deltas[-1].token_ids == [EOS_ID]
    assert stream.num_tokens == len(deltas)


def test_an_end_token_is_shown_when_stops_are_included_and_specials_not_skipped() -> None:
    options = {"include_stop_str_in_output": True, "skip_special_tokens": False}
    assert shown(run("hello", eos=True, **options)[0]) == "hello" + EOS


def test_a_stop_token_is_the_stop_reason_and_not_shown() -> None:
    (cat,) = TOKENIZER.encode(" cat", False)
    deltas, _ = run("hello cat", stop_token=cat, stop_token_ids=[cat])
    assert shown(deltas) == "hello"
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", cat)


def test_the_last_token_by_length_is_shown_with_what_was_held() -> None:
    deltas, _ = run("so st", stop=["stop"])
    assert shown(deltas) == "so st"
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("length", None)


def test_a_stop_string_ends_the_answer_before_the_engine_does() -> None:
    deltas, stream = run("hello world the cat sat", stop=["d the"])
    assert shown(deltas) == "hello worl"
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", "d the")
    assert stream.num_tokens == len(TOKENIZER.encode("hello world the", False))


def test_a_stop_string_on_the_last_token_wins_over_length() -> None:
    deltas, _ = run("hello stop", stop=["stop"])
    assert (shown(deltas), deltas[-1].finish_reason) == ("hello ", "stop")


def test_a_stop_string_is_included_when_asked_for() -> None:
    deltas, _ = run("hello stop end", stop=["stop"], include_stop_str_in_output=True)
    assert shown(deltas) == "hello stop"


def test_stop_strings_are_not_looked_for_in_the_first_min_tokens() -> None:
    deltas, _ = run("stopstopstop end", stop=["stop"], min_tokens=2, max_tokens=50)
    assert shown(deltas) == "stopstop"
    assert deltas[-1].stop_reason == "stop"


def test_offsets_point_at_each_tokens_text() -> None:
    deltas, _ = run("hello 日本 cat", logprobs=1)
    whole = shown(deltas)
    for delta in deltas:
        word = TOKENIZER.token_string(delta.token_ids[0])
        assert whole.startswith(word, delta.offsets[0])


def test_logprobs_that_nobody_asked_for_are_left_out() -> None:
    delta = TextStream(TOKENIZER, SamplingParams()).push(1, TokenLogprobs(-1.0, 1, [], []))
    assert (delta.logprobs, delta.offsets) == ([], [])


@pytest.mark.parametrize("params", [{"detokenize": False}, {}])
def test_without_a_tokenizer_there_are_tokens_and_no_text(params: dict[str, Any]) -> None:
    stream = TextStream(TOKENIZER if params else None, SamplingParams(**params))
    assert stream.push(5) == Delta("", [5], [], [])
    assert stream.push(6, None, "length") == Delta("", [6], [], [], "length")


@given(st.text(max_size=30), st.booleans())
def test_the_concatenation_is_the_whole_text(text: str, skip: bool) -> None:
    ids = TOKENIZER.encode(text, False)
    if ids:
        deltas, _ = run(text, skip_special_tokens=skip)
        assert shown(deltas) == TOKENIZER.decode(ids, skip)
