"""A server with limits of its own: refusals name the parameter and the limit, and cost nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.api.serving import Server
from tests.api.test_bad_input import CHAT, TEXT, USER, body_for, check_error

LIMITS = {
    "n": 3, "prompts": 3, "sequences": 5, "prompt_tokens": 80, "answer_tokens": 60, "logprobs": 2,
    "logprob_entries": 40, "stop_strings": 1, "stop_chars": 3, "stop_token_ids": 2,
    "bias_entries": 1, "messages": 2, "message_parts": 1, "json_depth": 5, "json_containers": 9,
    "head_bytes": 2048,
}  # fmt: skip


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else 1


# path, what is too much, the parameter that is named, what the message says is allowed
TOO_MUCH: list[tuple[str, dict[str, Any], str | None, str]] = [
    (TEXT, {"n": 4}, "n", "between 1 and 3"),
    (TEXT, {"prompt": ["x"] * 4}, "prompt", "at most 3"),
    (TEXT, {"prompt": ["x"] * 2, "n": 3}, "n", "at most 5"),
    (TEXT, {"prompt": [5] * 41, "n": 2}, "prompt", "more than 80"),
    (TEXT, {"prompt": [[5] * 27] * 3}, "prompt", "more than 80"),
    (TEXT, {"max_tokens": 61}, "max_tokens", "may be 60 at most"),
    (TEXT, {"prompt": ["x", "y"], "n": 2, "max_tokens": 16}, "max_tokens", "may be 15 at most"),
    (TEXT, {"logprobs": 3}, "logprobs", "between 0 and 2"),
    (TEXT, {"logprobs": 1, "max_tokens": 21}, "max_tokens", "may be 20 at most"),
    (TEXT, {"prompt": [5] * 21, "echo": True, "logprobs": 1}, "logprobs", "may be 40 at most"),
    (TEXT, {"stop": ["a", "b"]}, "stop", "at most 1"),
    (TEXT, {"stop": "abcd"}, "stop", "1 to 3 characters"),
    (TEXT, {"stop_token_ids": [1, 2, 3]}, "stop_token_ids", "at most 2"),
    (TEXT, {"logit_bias": {"5": 1, "6": 1}}, "logit_bias", "at most 1"),
    (TEXT, {"metadata": {"deep": nested(4)}}, None, "deeper than 5"),
    (TEXT, {"metadata": [{}] * 8}, None, "at most 9"),
    (CHAT, {"messages": USER * 3}, "messages", "at most 2"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 2}]},
     "messages[0].content", "at most 1"),
    (CHAT, {"messages": [{"role": "user", "content": "x " * 90}]}, "messages", "more than 80"),
    (CHAT, {"logprobs": True, "top_logprobs": 3}, "top_logprobs", "between 0 and 2"),
    (CHAT, {"n": 4}, "n", "between 1 and 3"),
    (CHAT, {"n": 3, "max_tokens": 21}, "max_tokens", "may be 20 at most"),
]  # fmt: skip


@pytest.fixture(scope="module")
def strict(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("strict") / "log"
    with Server(log, model=str(checkpoint), limits=LIMITS) as server:
        yield server.until_ready()


@pytest.mark.parametrize(("path", "too_much", "param", "allowed"), TOO_MUCH)
def test_what_is_past_a_limit_is_refused_by_name(
    path: str, too_much: dict[str, Any], param: str | None, allowed: str, strict: Server
) -> None:
    answer = strict.http.post(path, json=body_for(path, too_much))
    assert allowed in check_error(answer, 400, param)["message"]
    assert strict.metric("admitted_sequences_total") == strict.metric(
        "request_success_total", finished_reason="length"
    ) + strict.metric("request_success_total", finished_reason="stop")


def test_what_is_just_within_the_limits_is_answered(strict: Server) -> None:
    body = {
        "prompt": ["abc", "defg"], "n": 2, "max_tokens": 5, "logprobs": 1, "echo": True,
        "stop": "zzz", "stop_token_ids": [1, 5], "logit_bias": {"5": 1}, "ignore_eos": True,
        "metadata": nested(4), "user": "[[[[[[" * 9,
    }  # fmt: skip
    answer = strict.http.post(TEXT, json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 20


def test_a_chat_without_max_tokens_gets_what_the_limits_leave(strict: Server) -> None:
    for n in (1, 2, 3):
        body = {"messages": USER, "n": n, "ignore_eos": True}
        answer = strict.http.post(CHAT, json=body).json()
        assert answer["usage"]["completion_tokens"] == 60
        assert [choice["finish_reason"] for choice in answer["choices"]] == ["length"] * n


def test_a_head_past_the_limit_is_a_431(strict: Server) -> None:
    assert strict.http.get("/version", headers={"X-Long": "x" * 1000}).status_code == 200
    answer = strict.http.get("/version", headers={"X-Long": "x" * 2048})
    assert "longer than 2048 bytes" in check_error(answer, 431, None)["message"]
