"""The whole of the HTTP application above the sockets, over requests bent in values and in bytes.

A request goes from its body to the engine's Requests and its answer back to bytes, through every
middleware; the engine is one that writes a token at once. Every answer is a 200 or one of the
declared errors in OpenAI's shape, and nothing is left behind.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import strategies as st

from pagedserve.api import checkpoint
from pagedserve.api.app import build_app
from pagedserve.api.gate import Gate
from pagedserve.api.keys import Keys
from pagedserve.api.service import Service
from pagedserve.config import Config, ServerConfig
from pagedserve.engine.channel import AnyMessage, Finish, Ready, Submit
from pagedserve.request import FinishReason, Request
from pagedserve.step import TokenLogprobs
from tests.reliability.bending import bent, bent_bytes, fuzz, json_bytes
from tests.text.building import byte_level, write_checkpoint

VOCAB_SIZE, MAX_MODEL_LEN = 300, 512
ENCODER, DECODER = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(AnyMessage)
JSON = [(b"host", b"localhost"), (b"content-type", b"application/json")]
DECLARED = {400, 404, 408, 413, 429}

COMMON: dict[str, st.SearchStrategy[Any]] = {
    "model": st.just("fuzz"),
    "stream": st.booleans(),
    "n": st.integers(1, 3),
    "temperature": st.sampled_from([0, 0.7, 2]),
    "top_p": st.sampled_from([0.1, 1.0]),
    "top_k": st.integers(-1, 50),
    "min_p": st.sampled_from([0.0, 0.5]),
    "presence_penalty": st.sampled_from([-2, 0.5]),
    "frequency_penalty": st.sampled_from([0, 1.5]),
    "repetition_penalty": st.sampled_from([0.5, 1.2]),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "max_tokens": st.integers(1, 40),
    "min_tokens": st.integers(0, 1),
    "stop": st.one_of(st.just("x"), st.lists(st.sampled_from(["a", "語", "\n\n"]), max_size=4)),
    "stop_token_ids": st.lists(st.integers(0, VOCAB_SIZE), max_size=3),
    "include_stop_str_in_output": st.booleans(),
    "skip_special_tokens": st.booleans(),
    "ignore_eos": st.booleans(),
    "logit_bias": st.dictionaries(st.sampled_from(["0", "7"]), st.integers(-100, 100)),
    "priority": st.integers(-2, 2),
    "user": st.text(max_size=5),
    "metadata": st.just({"a": "b"}),
}
PROMPT = st.one_of(
    st.text(min_size=1, max_size=30),
    st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=20),
    st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=3),
)
CONTENT = st.one_of(
    st.text(max_size=20),
    st.just([{"type": "text", "text": "hi"}]),
    st.none(),
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": CONTENT},
        optional={"name": st.just("x"), "tool_calls": st.just([]), "refusal": st.none()},
    ),
    min_size=1,
    max_size=4,
)
COMPLETION = st.fixed_dictionaries(
    {"prompt": PROMPT},
    optional=COMMON | {"echo": st.booleans(), "logprobs": st.integers(0, 3), "best_of": st.just(1)},
)
CHAT = st.fixed_dictionaries(
    {"messages": MESSAGES},
    optional=COMMON
    | {
        "logprobs": st.just(True),
        "top_logprobs": st.integers(0, 3),
        "stream_options": st.just({"include_usage": True}),
        "tools": st.just([]),
        "response_format": st.just({"type": "text"}),
        "max_completion_tokens": st.integers(1, 40),
    },
)
REQUESTS = st.one_of(
    st.tuples(st.just("/v1/completions"), COMPLETION),
    st.tuples(st.just("/v1/chat/completions"), CHAT),
)


class OneToken:
    """An EngineClient whose engine has one token for every request, and nothing to do."""

    restarting = False
    ready = Ready(VOCAB_SIZE, MAX_MODEL_LEN, 64, 16, 8, [], "cpu", "float32", 0.0)

    def __init__(self) -> None:
        self.ids = 0

    def next_id(self) -> int:
        self.ids += 1
        return self.ids

    def submit(self, requests: list[Request], sinks: list[Any]) -> None:
        message = Submit(requests)
        assert DECODER.decode(ENCODER.encode(message)) == message, "it does not cross as it is"
        for request, sink in zip(requests, sinks, strict=True):
            assert request.prompt_token_ids and request.params.max_tokens
            length = len(request.prompt_token_ids) + request.params.max_tokens
            assert length <= MAX_MODEL_LEN
            sink.started(0)
            if request.params.prompt_logprobs is not None:
                sink.prompt_logprobs([self.entry(request)] * (len(request.prompt_token_ids) - 1))
            wanted = request.params.logprobs is not None
            finish = Finish(request.id, FinishReason.LENGTH)
            sink.token(7, self.entry(request) if wanted else None, finish)

    @staticmethod
    def entry(request: Request) -> TokenLogprobs:
        count = request.params.logprobs or 0
        return TokenLogprobs(-1.5, 1, list(range(count)), [-2.0] * count)

    def abort(self, ids: list[int]) -> None:
        assert not ids, "what has ended is not aborted"


class Site:
    """The application over that engine, called as uvicorn calls it."""

    def __init__(self, directory: Path):
        self.runner = asyncio.Runner()
        self.runner.run(self.build(write_checkpoint(directory, byte_level())))

    async def build(self, directory: Path) -> None:
        config = Config.from_options({"model": str(directory), "served_model_name": "fuzz"})
        self.service = Service(config, OneToken())  # type: ignore[arg-type]
        self.service.text = checkpoint.load(config.model, lambda phase, detail: None)
        self.service.admission.settle(OneToken.ready)
        gate = Gate.opened(ServerConfig(port=0), Keys(None, None))
        gate.sock.close()  # nobody connects: the application is called
        self.app = build_app(self.service, gate)

    async def post(self, path: str, body: bytes, headers: list[tuple[bytes, bytes]]) -> Any:
        """Status and body of the answer."""
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
            "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"",
            "root_path": "", "headers": headers, "client": ("127.0.0.1", 9), "server": ("x", 80),
        }  # fmt: skip
        sent: list[dict[str, Any]] = []
        asked = False

        async def receive() -> dict[str, Any]:
            nonlocal asked
            if asked:
                await asyncio.get_running_loop().create_future()  # the client stays
            asked = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        assert sent[0]["type"] == "http.response.start"
        assert not sent[-1].get("more_body", False)
        return sent[0]["status"], b"".join(each.get("body", b"") for each in sent[1:])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    made = Site(tmp_path_factory.mktemp("fuzz"))
    yield made
    made.runner.close()


def body_of(fields: dict[str, Any], r: random.Random) -> bytes:
    """Some as they are, most with other values, a few with other bytes."""
    kind = r.random()
    if kind < 0.1:
        return json_bytes(fields)
    body = json_bytes(bent(fields, r, r.choice([1, 1, 1, 2, 4])))
    return bent_bytes(body, r, r.choice([1, 2])) if kind > 0.8 else body


def headers_of(r: random.Random) -> list[tuple[bytes, bytes]]:
    """JSON, and now and then something that the server reads besides."""
    extra = [
        (b"x-request-id", r.choice([b"abc", b"\xff" * 9, b"a b", b"x" * 999])),
        (b"x-request-timeout", r.choice([b"30", b"0", b"-1", b"nan", b"inf", b"1e9", b"\xb2"])),
        (b"content-length", r.choice([b"0", b"99999999999", b"-1", b"x", b"\xb2", b"9" * 5000])),
        (b"content-type", r.choice([b"text/plain", b"application/json; charset=x", b""])),
        (b"authorization", r.choice([b"Bearer x", b"\xff"])),
    ]
    return JSON if r.random() < 0.9 else [*JSON, r.choice(extra)][:: r.choice([1, -1])]


def check_answer(status: int, body: bytes) -> str:
    """What was answered, in a word; it must be of a declared shape."""
    if status != 200:
        assert status in DECLARED, (status, body)
        assert len(body) <= 4096
        error = json.loads(body)["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
        return f"{status} {error['code']}"
    if body.startswith(b"data: "):
        events = body.removesuffix(b"\n\n").split(b"\n\n")
        assert events[-1] == b"data: [DONE]"
        assert all("error" not in json.loads(event[6:]) for event in events[:-1])
        return "stream"
    assert json.loads(body)["choices"]
    return "answer"


@pytest.mark.parametrize("cases", [3_000, pytest.param(1_000_000, marks=pytest.mark.marathon)])
def test_every_request_is_answered_or_refused_in_the_declared_way(cases: int, site: Site) -> None:
    admission = site.service.admission

    def outcome(asked: tuple[str, dict[str, Any]], r: random.Random) -> str:
        path, fields = asked
        answer = site.runner.run(site.post(path, body_of(fields, r), headers_of(r)))
        assert not site.service.answers and not admission.num_live and not admission.num_waiting
        assert not any(account.num_open for account in admission.accounts.values())
        return check_answer(*answer)

    outcomes = fuzz("schema", cases, REQUESTS, outcome)
    assert outcomes["answer"] and outcomes["stream"] and len(outcomes) > 6
    ended = admission.counts.ended
    assert admission.counts.admitted == ended.total() == ended[FinishReason.LENGTH]
