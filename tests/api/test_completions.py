"""`/v1/completions` through the official client, over the toy engine that writes prompts back."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from tests.api.serving import Server

TEXT = "hello world 日本 the cat"


def streamed(client: openai.OpenAI, **options: Any) -> list[Any]:
    return list(client.completions.create(model="toy", stream=True, **options))


def test_a_completion_has_the_shape_of_openais(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="toy", prompt=TEXT, max_tokens=7)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.model == "toy"
    assert answer.system_fingerprint is not None
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert TEXT.startswith(choice.text)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 7
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 7
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n": 3, "seed": 5},
        {"stop": [" the"]},
        {"logprobs": 2},
        {"echo": True},
        {"echo": True, "logprobs": 1, "n": 2},
        {"echo": True, "logprobs": 1, "max_tokens": 0},
    ],
)
def test_a_stream_says_what_the_whole_answer_says(
    options: dict[str, Any], client: openai.OpenAI
) -> None:
    options = {"prompt": TEXT, "max_tokens": 12} | options
    whole = client.completions.create(model="toy", **options)
    chunks = streamed(client, stream_options={"include_usage": True}, **options)
    for choice in whole.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(c.text for c in mine) == choice.text
        assert [c.finish_reason for c in mine if c.finish_reason] == [choice.finish_reason]
        assert mine[-1].finish_reason == choice.finish_reason
        if choice.logprobs is not None:
            for field in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
                parts = [getattr(c.logprobs, field) for c in mine if c.logprobs]
                assert sum(parts, []) == getattr(choice.logprobs, field)
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_without_include_usage_no_chunk_speaks_of_usage(http: httpx.Client) -> None:
    body = {"prompt": "hello", "stream": True, "max_tokens": 3}
    events = http.post("/v1/completions", json=body).text
    assert "usage" not in events
    assert events.endswith("data: [DONE]\n\n")


def test_every_form_of_prompt_is_taken(client: openai.OpenAI, http: httpx.Client) -> None:
    def texts(prompt: Any) -> list[str]:
        body = {"prompt": prompt, "max_tokens": 4}
        choices = http.post("/v1/completions", json=body).json()["choices"]
        assert [choice["index"] for choice in choices] == list(range(len(choices)))
        return [choice["text"] for choice in choices]

    assert len(texts("hello world")) == 1
    assert texts(["hello world", "the cat"]) == texts("hello world") + texts("the cat")
    ids = [104, 101, 108]
    assert texts([ids, ids]) == texts(ids) * 2


def test_choices_of_several_prompts_are_numbered_prompt_by_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="toy", prompt=["hello", " cat"], n=2, max_tokens=2, seed=1
    )
    assert [choice.text for choice in answer.choices] == ["hello", "hello", " cat", " cat"]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer.usage.prompt_tokens == 4  # each prompt once, with its <s>


def test_16_tokens_are_the_default_and_fewer_where_no_more_fit(http: httpx.Client) -> None:
    def usage(prompt: list[int]) -> Any:
        return http.post("/v1/completions", json={"prompt": prompt}).json()["usage"]

    assert usage([5])["completion_tokens"] == 16
    assert usage([5] * 2044)["completion_tokens"] == 4


def test_a_stop_string_hides_itself_and_is_the_stop_reason(http: httpx.Client) -> None:
    body = {"prompt": TEXT, "max_tokens": 50, "stop": "本 t"}
    answer = http.post("/v1/completions", json=body).json()
    (choice,) = answer["choices"]
    assert choice["text"] == "hello world 日"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "本 t")
    assert answer["usage"]["completion_tokens"] < 14


def test_a_stop_string_aborts_the_engine(server: Server, client: openai.OpenAI) -> None:
    before = server.metric("num_preemptions_total")
    client.completions.create(model="toy", prompt=TEXT, max_tokens=2000, stop=["cat"])
    server.wait_for("num_preemptions_total", before + 1)
    server.wait_for("num_requests_running", 0)


def test_stop_token_ids_and_included_stops_are_honoured(http: httpx.Client) -> None:
    body = {"prompt": [104, 101, 108, 111], "max_tokens": 9, "stop_token_ids": [108]}
    (choice,) = http.post("/v1/completions", json=body).json()["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", 108)
    body = {"prompt": TEXT, "max_tokens": 50, "stop": [" the"], "include_stop_str_in_output": True}
    (choice,) = http.post("/v1/completions", json=body).json()["choices"]
    assert choice["text"].endswith(" the")


def test_the_end_token_ends_unless_ignored(http: httpx.Client) -> None:
    body: dict[str, Any] = {"prompt": "hello</s>", "max_tokens": 6}
    (choice,) = http.post("/v1/completions", json=body).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("hello", "stop")
    assert choice["stop_reason"] is None
    (choice,) = http.post("/v1/completions", json=body | {"ignore_eos": True}).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("hellohello", "length")


def test_special_tokens_are_shown_when_asked_for(http: httpx.Client) -> None:
    body = {"prompt": "hello", "max_tokens": 3, "skip_special_tokens": False}
    (choice,) = http.post("/v1/completions", json=body).json()["choices"]
    assert choice["text"] == "<s>hello<s>"


def test_logprobs_come_in_four_columns(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="toy", prompt=TEXT, max_tokens=9, logprobs=2)
    (choice,) = answer.choices
    table = choice.logprobs
    assert table is not None
    assert table.tokens is not None and table.text_offset is not None
    assert table.top_logprobs is not None and table.token_logprobs == [-0.5] * 9
    for token, offset, top in zip(table.tokens, table.text_offset, table.top_logprobs, strict=True):
        assert token == "<s>" or choice.text.startswith(token, offset)
        assert len(top) == 2 and top[token] == -0.5


def test_zero_logprobs_still_give_the_tokens_own(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="toy", prompt="hello", max_tokens=2, logprobs=0)
    table = answer.choices[0].logprobs
    assert table is not None and table.top_logprobs == [{"<s>": -0.5}, {"hello": -0.5}]


def test_echo_scores_a_prompt_without_writing(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="toy", prompt="hello cat", max_tokens=0, echo=True, logprobs=1
    )
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == ("hello cat", "length")
    table = choice.logprobs
    assert table is not None and table.tokens is not None
    assert "".join(table.tokens) == "<s>hello cat"
    assert table.token_logprobs is not None and table.top_logprobs is not None
    assert table.token_logprobs[0] is None and table.top_logprobs[0] is None
    assert table.token_logprobs[1:] == [-0.5] * (len(table.tokens) - 1)
    assert answer.usage is not None and answer.usage.completion_tokens == 0


def test_echo_of_token_ids_shows_their_text(http: httpx.Client) -> None:
    body = {"prompt": "hello cat", "max_tokens": 1, "echo": True}
    by_text = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    assert by_text == "hello cat"  # and the end of the prompt's own <s> is not shown


def test_the_request_id_is_echoed_and_names_the_answer(http: httpx.Client) -> None:
    body = {"prompt": "hello", "max_tokens": 1}
    answer = http.post("/v1/completions", json=body, headers={"X-Request-Id": "my-id.7"})
    assert answer.headers["x-request-id"] == "my-id.7"
    assert answer.json()["id"] == "cmpl-my-id.7"
    other = http.post("/v1/completions", json=body, headers={"X-Request-Id": "a b" * 9})
    assert len(other.headers["x-request-id"]) == 32
