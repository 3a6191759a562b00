"""`/v1/chat/completions` through the official client, over the toy engine."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.api.serving import Server

MESSAGES: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hello 日本 😀"},
]
PROMPT = "[system]be kind\n[user]hello 日本 😀\n[assistant]"


def test_a_chat_answer_has_the_shape_of_openais(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="toy", messages=MESSAGES, max_tokens=60)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.tool_calls is None
    assert choice.message.content is not None
    assert choice.message.content.startswith(PROMPT)  # one <s>, from the template alone
    assert choice.finish_reason == "length"
    assert answer.usage is not None and answer.usage.completion_tokens == 60


def test_an_answer_can_be_sent_back_as_it_came(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="toy", messages=MESSAGES, max_tokens=5)
    history: list[Any] = [*MESSAGES, answer.choices[0].message, {"role": "user", "content": "x"}]
    assert client.chat.completions.create(model="toy", messages=history, max_tokens=5).choices


@pytest.mark.parametrize(
    "options",
    [{}, {"n": 2}, {"stop": ["日本 😀"]}, {"logprobs": True, "top_logprobs": 2}, {"seed": 3}],
)
def test_a_stream_says_what_the_whole_answer_says(
    options: dict[str, Any], client: openai.OpenAI
) -> None:
    whole = client.chat.completions.create(
        model="toy", messages=MESSAGES, max_completion_tokens=40, **options
    )
    chunks = list(
        client.chat.completions.create(
            model="toy",
            messages=MESSAGES,
            max_completion_tokens=40,
            stream=True,
            stream_options={"include_usage": True},
            **options,
        )
    )
    for choice in whole.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert (mine[0].delta.role, mine[0].delta.content) == ("assistant", "")
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        assert [c.finish_reason for c in mine[:-1]] == [None] * (len(mine) - 1)
        assert (mine[-1].finish_reason, mine[-1].delta.content) == (choice.finish_reason, None)
        if choice.logprobs is not None:
            entries = [entry for c in mine if c.logprobs for entry in c.logprobs.content or []]
            assert entries == choice.logprobs.content
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    assert all("\ufffd" not in (c.delta.content or "") for ch in chunks for c in ch.choices)


def test_logprobs_carry_the_bytes_of_each_token(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="toy", messages=MESSAGES, max_tokens=60, logprobs=True, top_logprobs=1
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    written = b"".join(bytes(entry.bytes or []) for entry in logprobs.content)
    assert written.decode(errors="ignore").startswith("<s>" + PROMPT)
    assert all(len(entry.top_logprobs) == 1 for entry in logprobs.content)


def test_an_answer_may_fill_the_context_by_default(client: openai.OpenAI) -> None:
    long: list[ChatCompletionMessageParam] = [{"role": "user", "content": "x " * 900}]
    answer = client.chat.completions.create(model="toy", messages=long)
    assert answer.usage is not None and answer.usage.total_tokens == 2048


def test_parts_of_text_are_joined(client: openai.OpenAI) -> None:
    parts: Any = [{"type": "text", "text": "hello"}, {"type": "text", "text": " cat"}]
    answer = client.chat.completions.create(
        model="toy", messages=[{"role": "user", "content": parts}], max_tokens=30
    )
    assert "[user]hello\n cat" in (answer.choices[0].message.content or "")


def test_the_grammar_of_a_stream(http: httpx.Client) -> None:
    """role chunk, content chunks, finish chunk, usage chunk, [DONE]: nothing else."""
    body = {"messages": MESSAGES, "max_tokens": 4, "stream": True}
    body["stream_options"] = {"include_usage": True}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [event.removeprefix("data: ") for event in answer.text.split("\n\n")[:-1]]
    assert events.pop() == "[DONE]"
    role, *content, finish, usage = map(json.loads, events)
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert [list(chunk["choices"][0]["delta"]) for chunk in content] == [["content"]] * len(content)
    assert finish["choices"][0]["delta"] == {}
    assert finish["choices"][0]["finish_reason"] == "length"
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 4
    heads = [{k: v for k, v in e.items() if k not in ("choices", "usage")} for e in (role, usage)]
    assert heads[0] == heads[1]


def test_neutral_and_bookkeeping_fields_change_nothing(http: httpx.Client) -> None:
    body = {"messages": MESSAGES, "max_tokens": 4, "model": None, "temperature": None, "stop": None}
    extra = {
        "tools": None,
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "parallel_tool_calls": True,
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "safety_identifier": "x",
        "prompt_cache_key": "y",
        "logit_bias": {},
    }
    plain = http.post("/v1/chat/completions", json=body).json()
    other = http.post("/v1/chat/completions", json=body | extra).json()
    assert other["choices"] == plain["choices"]


def test_an_error_midway_is_an_event_and_then_done(server: Server, client: openai.OpenAI) -> None:
    body = {"messages": MESSAGES, "stream": True, "seed": 6662}  # the toy's order to fail
    events = server.http.post("/v1/chat/completions", json=body).text.split("\n\n")
    assert events[-2] == "data: [DONE]"
    error = json.loads(events[-3].removeprefix("data: "))["error"]
    assert error["message"] == "a toy failure" and error["type"] == "server_error"
    stream = client.chat.completions.create(model="toy", messages=MESSAGES, seed=6662, stream=True)
    with pytest.raises(openai.APIError, match="a toy failure"):
        list(stream)
    with pytest.raises(openai.InternalServerError, match="a toy failure"):
        client.chat.completions.create(model="toy", messages=MESSAGES, seed=6662)


def test_one_failed_choice_ends_the_others_too(server: Server, http: httpx.Client) -> None:
    body = {"messages": MESSAGES, "seed": 6662, "n": 3, "max_tokens": 1500}
    assert http.post("/v1/chat/completions", json=body).status_code == 500
    server.wait_for("num_requests_running", 0)
