"""Whatever JSON comes, the schema either takes it or refuses it by name; it never breaks."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedserve.api.openai_completions import read_prompts
from pagedserve.api.openai_schema import (
    BOOKKEEPING,
    NEUTRAL_CHAT,
    NEUTRAL_COMPLETION,
    ChatBody,
    CompletionBody,
    checked,
)
from pagedserve.errors import RequestError
from pagedserve.limits import Limits
from pagedserve.request import SamplingParams, check_prompt, check_vocabulary
from pagedserve.text.chat import check_messages

numbers = st.integers() | st.floats() | st.sampled_from([10**400, -(10**30), 0, 1, True, None])
json_values: st.SearchStrategy[Any] = st.recursive(
    numbers | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


def bodies(kind: type[Any], neutral: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    names = sorted([*kind.model_fields, *neutral, *BOOKKEEPING])
    return st.dictionaries(st.sampled_from(names), json_values, max_size=4)


def settle(params: SamplingParams) -> None:
    """What happens to parameters until they cross to the engine."""
    check_vocabulary(params, 100)
    msgspec.msgpack.encode(params)


@given(bodies(CompletionBody, NEUTRAL_COMPLETION))
def test_any_completion_body_is_taken_or_refused(fields: dict[str, Any]) -> None:
    try:
        body = checked({"prompt": "x"} | fields, CompletionBody, NEUTRAL_COMPLETION)
        settle(body.params({}, Limits(), max_tokens=body.max_tokens, logprobs=body.logprobs))
        for prompt in read_prompts(body.prompt, Limits()):
            if not isinstance(prompt, str):
                check_prompt(prompt, SamplingParams(), vocab_size=100, max_model_len=50)
    except RequestError as error:
        assert error.message


@given(bodies(ChatBody, NEUTRAL_CHAT))
def test_any_chat_body_is_taken_or_refused(fields: dict[str, Any]) -> None:
    try:
        messages = [{"role": "user", "content": "x"}]
        body = checked({"messages": messages} | fields, ChatBody, NEUTRAL_CHAT)
        settle(
            body.params({}, Limits(), max_tokens=body.limit(), logprobs=body.num_logprobs(Limits()))
        )
        check_messages(body.messages)
    except RequestError as error:
        assert error.message


@given(st.lists(st.dictionaries(st.sampled_from(["role", "content", "name", "x"]), json_values)))
def test_any_messages_are_taken_or_refused(messages: list[Any]) -> None:
    try:
        check_messages(messages)
    except RequestError as error:
        assert error.param is not None and error.param.startswith("messages")


def test_what_is_left_out_or_null_is_the_models_default() -> None:
    defaults = {"temperature": 0.5, "top_k": 7, "max_tokens": 9}
    body = checked(
        {"prompt": "x", "top_k": 3, "temperature": None}, CompletionBody, NEUTRAL_COMPLETION
    )
    params = body.params(defaults, Limits(), max_tokens=body.max_tokens)
    # `max_tokens` is settled by the dialect, which knows what fits.
    assert (params.temperature, params.top_k, params.max_tokens) == (0.5, 3, None)


@pytest.mark.parametrize("name", [*NEUTRAL_CHAT, *BOOKKEEPING])
def test_null_is_always_neutral(name: str) -> None:
    assert checked({"messages": [], name: None}, ChatBody, NEUTRAL_CHAT)


def test_null_means_the_default_for_every_parameter() -> None:
    fields = dict.fromkeys(set(CompletionBody.model_fields) - {"prompt"})
    body = checked({"prompt": "x"} | fields, CompletionBody, NEUTRAL_COMPLETION)
    assert body.params({}, Limits()) == SamplingParams()


def test_every_sampling_parameter_arrives() -> None:
    given = {
        "n": 2,
        "temperature": 1,  # an integer is a number
        "top_p": 0.5,
        "top_k": 3,
        "min_p": 0.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.1,
        "seed": 4,
        "min_tokens": 1,
        "stop": ["a", "b"],
        "stop_token_ids": [5],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "ignore_eos": True,
        "logit_bias": {"7": 1.0},
    }
    body = checked({"prompt": "x"} | given, CompletionBody, NEUTRAL_COMPLETION)
    assert body.params({}, Limits()) == SamplingParams(**given)  # type: ignore[arg-type]
    others = {"max_tokens", "logprobs", "prompt_logprobs", "detokenize"}
    assert given.keys() | others == set(SamplingParams.__struct_fields__)


@pytest.mark.parametrize(("wrong", "neutral"), [(1, True), (True, 1)])
def test_a_flag_is_no_number(wrong: Any, neutral: Any) -> None:
    with pytest.raises(RequestError, match="odd is not supported"):
        checked({"prompt": "x", "odd": wrong}, CompletionBody, {"odd": (neutral,)})
