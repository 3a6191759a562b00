"""Every bad request gets a small, fast 4xx that names the parameter, and disturbs nobody."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx
import openai
import pytest

from tests.api.serving import Server

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "hi"}]
NAN, INF = float("nan"), float("inf")

# path, what is wrong, the parameter that the error names
BAD: list[tuple[str, dict[str, Any], str | None]] = [
    # wrong types
    (TEXT, {"temperature": "hot"}, "temperature"),
    (TEXT, {"temperature": True}, "temperature"),
    (TEXT, {"top_p": [0.5]}, "top_p"),
    (TEXT, {"max_tokens": 1.5}, "max_tokens"),
    (TEXT, {"max_tokens": "7"}, "max_tokens"),
    (TEXT, {"top_k": 0.01}, "top_k"),
    (TEXT, {"n": True}, "n"),
    (TEXT, {"seed": "x"}, "seed"),
    (TEXT, {"stream": "yes"}, "stream"),
    (TEXT, {"echo": 1}, "echo"),
    (TEXT, {"logprobs": True}, "logprobs"),
    (TEXT, {"model": 7}, "model"),
    (TEXT, {"stop": 5}, "stop"),
    (TEXT, {"stop": {"a": 1}}, "stop"),
    (TEXT, {"stop": [5]}, "stop"),
    (TEXT, {"stop": ""}, "stop"),
    (TEXT, {"stop_token_ids": 5}, "stop_token_ids"),
    (TEXT, {"stop_token_ids": ["5"]}, "stop_token_ids.0"),
    (TEXT, {"stop_token_ids": [True]}, "stop_token_ids.0"),
    (TEXT, {"logit_bias": [1]}, "logit_bias"),
    (TEXT, {"logit_bias": {"a": 1}}, "logit_bias"),
    (TEXT, {"logit_bias": {"5": "much"}}, "logit_bias"),
    (TEXT, {"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
    (TEXT, {"priority": 1 << 40}, "priority"),
    (TEXT, {"stream_options": 5, "stream": True}, "stream_options"),
    (TEXT, {"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
    (CHAT, {"logprobs": 3}, "logprobs"),
    (CHAT, {"messages": "hi"}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    # values out of bounds
    (TEXT, {"n": 10**9}, "n"),
    (TEXT, {"n": 0}, "n"),
    (TEXT, {"n": 10**400}, "n"),
    (TEXT, {"temperature": NAN}, "temperature"),
    (TEXT, {"temperature": INF}, "temperature"),
    (TEXT, {"temperature": -1}, "temperature"),
    (TEXT, {"temperature": 10**400}, "temperature"),
    (TEXT, {"top_p": 1.5}, "top_p"),
    (TEXT, {"min_p": -0.1}, "min_p"),
    (TEXT, {"repetition_penalty": 0}, "repetition_penalty"),
    (TEXT, {"presence_penalty": 3}, "presence_penalty"),
    (TEXT, {"logit_bias": {"5": NAN}}, "logit_bias"),
    (TEXT, {"logit_bias": {"5": 101}}, "logit_bias"),
    (TEXT, {"logprobs": 10**9}, "logprobs"),
    (TEXT, {"max_tokens": 0}, "max_tokens"),
    (TEXT, {"max_tokens": -1}, "max_tokens"),
    (TEXT, {"seed": 1 << 64}, "seed"),
    (TEXT, {"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    (TEXT, {"stop": ["x" * 1000]}, "stop"),
    (TEXT, {"stop": ["x"] * 17}, "stop"),
    (TEXT, {"stop": ["x" * 100] * 10_000}, "stop"),  # 1 MB
    (TEXT, {"stop": [7] * 500_000}, "stop"),
    (TEXT, {"stop_token_ids": [7] * 300_000}, "stop_token_ids"),
    (TEXT, {"stop_token_ids": ["x"] * 300_000}, "stop_token_ids.0"),
    (TEXT, {"logit_bias": {str(i): 1 for i in range(100_000)}}, "logit_bias"),
    (TEXT, {"prompt": ["x"] * 1025}, "prompt"),
    (TEXT, {"prompt": ["x"] * 1000, "n": 100}, "n"),
    (CHAT, {"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens"),
    (CHAT, {"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
    (CHAT, {"stream_options": {"include_usage": True}}, "stream_options"),
    # prompts
    (TEXT, {"prompt": []}, "prompt"),
    (TEXT, {"prompt": [[]]}, "prompt"),
    (TEXT, {"prompt": None}, "prompt"),
    (TEXT, {"prompt": 5}, "prompt"),
    (TEXT, {"prompt": ["x", 5]}, "prompt"),
    (TEXT, {"prompt": [[1], ["x"]]}, "prompt"),
    (TEXT, {"prompt": [1.5]}, "prompt"),
    (TEXT, {"prompt": [True]}, "prompt"),
    (TEXT, {"prompt": [10**9]}, "prompt"),
    (TEXT, {"prompt": [-1]}, "prompt"),
    (TEXT, {"prompt": [10**30]}, "prompt"),
    (TEXT, {"prompt": [5] * 2048}, "prompt"),
    (TEXT, {"prompt": [5] * 1_000_000}, "prompt"),
    (TEXT, {"prompt": "x " * 2048}, "prompt"),
    (TEXT, {"prompt": "x" * 1_000_000}, "prompt"),
    (TEXT, {"prompt": [5] * 2000, "max_tokens": 100}, "max_tokens"),
    (TEXT, {"stop_token_ids": [10**6]}, "stop_token_ids"),
    (TEXT, {"logit_bias": {"1000000": 5}}, "logit_bias"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": "x " * 5000}]}, "messages"),
    (CHAT, {"messages": USER, "max_tokens": 2047}, "max_tokens"),
    # unknown and unsupported
    (TEXT, {"temprature": 1}, "temprature"),
    (TEXT, {"ü" * 5000: 1}, "ü" * 63 + "…"),
    (TEXT, {"\x00" * 5000: 1}, "\x00" * 63 + "…"),
    (TEXT, {f"x{i}": 1 for i in range(50_000)}, "x0"),
    (TEXT, {"best_of": 2}, "best_of"),
    (TEXT, {"suffix": "x"}, "suffix"),
    (TEXT, {"messages": USER}, "messages"),
    (CHAT, {"prompt": "x"}, "prompt"),
    (CHAT, {"tools": [{"type": "function"}]}, "tools"),
    (CHAT, {"tool_choice": "auto"}, "tool_choice"),
    (CHAT, {"response_format": {"type": "json_object"}}, "response_format"),
    (CHAT, {"modalities": ["audio"]}, "modalities"),
    (CHAT, {"audio": {"voice": "x"}}, "audio"),
    (CHAT, {"reasoning_effort": "high"}, "reasoning_effort"),
    (CHAT, {"prediction": {}}, "prediction"),
    (CHAT, {"stream": True, "stream_options": {"include_obfuscation": True}},
     "stream_options.include_obfuscation"),
]  # fmt: skip


def body_for(path: str, wrong: dict[str, Any]) -> dict[str, Any]:
    return {"messages": USER} | wrong if path == CHAT else {"prompt": "hi"} | wrong


def check_error(answer: httpx.Response, status: int, param: str | None) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert len(answer.content) < 4096
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert isinstance(error["code"], str) and error["message"]
    return error


@pytest.mark.parametrize(
    ("path", "wrong", "param"),
    BAD,
    ids=[f"{param}-{at}"[:40] for at, (_, _, param) in enumerate(BAD)],
)
def test_a_bad_value_is_refused_by_name(
    path: str, wrong: dict[str, Any], param: str | None, http: httpx.Client
) -> None:
    # json, not httpx: NaN is no JSON, but it is what Python clients send
    body = json.dumps(body_for(path, wrong)).encode()
    error = check_error(
        http.post(path, content=body, headers={"Content-Type": "application/json"}), 400, param
    )
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"5", b"null", b'{"prompt": "x"', b"\xff\xfe", b"[" * 100_000, b"{}x"],
)
@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_broken_json_is_refused(path: str, body: bytes, http: httpx.Client) -> None:
    answer = http.post(path, content=body, headers={"Content-Type": "application/json"})
    check_error(answer, 400, None)


@pytest.mark.parametrize(("path", "param"), [(TEXT, "prompt"), (CHAT, "messages")])
def test_a_missing_field_is_named(path: str, param: str, http: httpx.Client) -> None:
    assert check_error(http.post(path, json={}), 400, param)["code"] == "missing_required_parameter"


@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_an_unknown_model_is_a_404(path: str, http: httpx.Client) -> None:
    body = body_for(path, {"model": "x" * 1000})
    assert check_error(http.post(path, json=body), 404, "model")["code"] == "model_not_found"
    assert http.get("/v1/models/other").status_code == 404
    assert http.get("/v1/models/toy").json()["id"] == "toy"


def test_the_sdk_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="toy", prompt="hi", temperature=7e9)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="none", prompt="hi")


def test_a_prompt_too_long_says_how_long_it_may_be(http: httpx.Client) -> None:
    error = check_error(http.post(TEXT, json={"prompt": [5] * 3000}), 400, "prompt")
    assert error["code"] == "context_length_exceeded"
    assert "maximum context length is 2048 tokens" in error["message"]


def test_other_media_types_are_refused(http: httpx.Client) -> None:
    """A foreign web page can post text/plain here without being asked; JSON it cannot."""
    answer = http.post(TEXT, content=b"{}", headers={"Content-Type": "text/plain"})
    assert check_error(answer, 400, None)["code"] == "unsupported_media_type"


def test_a_body_too_long_is_a_413(http: httpx.Client) -> None:
    def pieces() -> Any:
        for _ in range(17):
            yield b"x" * (1 << 20)

    headers = {"Content-Type": "application/json"}
    declared = http.post(TEXT, content=b"x" * (17 << 20), headers=headers)
    check_error(declared, 413, None)
    check_error(http.post(TEXT, content=pieces(), headers=headers), 413, None)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", TEXT, 405),
        ("POST", "/health", 405),
        ("GET", "/docs", 404),
    ],
)
def test_unknown_routes_have_openais_shape(
    method: str, path: str, status: int, http: httpx.Client
) -> None:
    check_error(http.request(method, path), status, None)


def test_running_requests_go_on_while_bad_ones_are_refused(
    server: Server, client: openai.OpenAI
) -> None:
    """How fast each refusal is, and how late a token comes meanwhile: benchmarks/refusals.py."""
    tokens = 0

    def read() -> None:
        nonlocal tokens
        stream = client.completions.create(
            model="toy", prompt="hello", max_tokens=160, seed=6663, stream=True
        )
        for _ in stream:  # a token each 20 ms
            tokens += 1

    reader = threading.Thread(target=read)
    reader.start()
    seen = []  # tokens that had come when each refusal was answered
    while reader.is_alive():
        for path, wrong, _ in BAD:
            body = json.dumps(body_for(path, wrong)).encode()
            answer = server.http.post(
                path, content=body, headers={"Content-Type": "application/json"}
            )
            assert 400 <= answer.status_code < 500
            seen.append(tokens)
            if not reader.is_alive():
                break
    reader.join()
    assert tokens > 70  # every second token is a <s>, which is not shown
    # Had either waited for the other, they would not have come in turns.
    assert len(set(seen)) > 20 and len(seen) > 20
