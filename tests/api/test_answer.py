"""Answers and streams without a server: silence, lag, bugs, aborts."""

from __future__ import annotations

import asyncio
import json
from typing import Any, cast

import httpx
import pytest
from fastapi import FastAPI

from pagedserve.api import sse
from pagedserve.api.admission import ANYBODY, Admission, Visit
from pagedserve.api.answer import Answer, ClientGone, joined, reading
from pagedserve.api.app import on_bug, on_error
from pagedserve.api.deadlines import Deadlines
from pagedserve.api.metrics import Metrics
from pagedserve.api.openai_shapes import error_response
from pagedserve.api.sse import DONE, KEEP_ALIVE, Envelope, EventStream
from pagedserve.config import ServerConfig
from pagedserve.engine.channel import Finish
from pagedserve.engine.client import EngineClient
from pagedserve.errors import PagedServeError, RequestError, UnavailableError
from pagedserve.request import Request, SamplingParams
from pagedserve.text.deltas import Delta, TextStream
from pagedserve.text.tokenizer import Tokenizer
from tests.text.building import byte_level

TOKENIZER = Tokenizer(byte_level())
LETTER_H, LETTER_I = TOKENIZER.encode("hi", False)


class Client:
    """The engine client, as far as an answer uses it."""

    def __init__(self) -> None:
        self.aborted: list[int] = []

    def abort(self, ids: list[int]) -> None:
        self.aborted += ids


class Bed:
    """An answer of `n` sequences with what is around it."""

    def __init__(self, n: int = 1, deadlines: Deadlines = Deadlines(), **params: Any):  # noqa: B008
        self.client = Client()
        self.closed: list[Answer] = []
        self.metrics = Metrics("toy")
        self.admission = Admission(ServerConfig())
        self.answer = Answer(
            cast(EngineClient, self.client),
            self.metrics,
            self.closed.append,
            self.admission,
            Visit(deadlines=deadlines),
        )
        self.admission.admit(ANYBODY, [1] * n)
        wanted = SamplingParams(**params)
        self.sinks = [
            self.answer.add(Request(id, [1], wanted, 0), TextStream(TOKENIZER, wanted))
            for id in range(n)
        ]


class Plain:
    """Events that show their Deltas' text."""

    def begin(self) -> bytes:
        return b"begin\n"

    async def delta(self, index: int, delta: Delta) -> bytes:
        return f"{index}:{delta.text}\n".encode()

    def end(self) -> bytes:
        return b"end\n"


async def never() -> Any:
    """A `receive` whose client stays."""
    await asyncio.sleep(60)


async def gone() -> Any:
    """A `receive` whose client has left."""
    return {"type": "http.disconnect"}


async def write(bed: Bed, receive: Any = never, lag: float = 0.0) -> list[bytes]:
    """Everything that a stream writes, by write."""
    written: list[bytes] = []

    async def send(message: Any) -> None:
        await asyncio.sleep(lag)
        written.append(message.get("body", b"start"))

    await EventStream(bed.answer, Plain())({"type": "http"}, receive, send)
    return written


def test_silence_is_filled_with_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE_SECONDS", 0.02)

    async def run() -> None:
        bed = Bed()
        writing = asyncio.create_task(write(bed))
        await asyncio.sleep(0.07)
        bed.sinks[0].token(LETTER_H, None, None)
        await asyncio.sleep(0)
        bed.sinks[0].token(LETTER_I, None, Finish(0, "length"))
        written = await writing
        assert written.count(KEEP_ALIVE) in (2, 3)
        rest = b"".join(part for part in written if part != KEEP_ALIVE)
        assert rest == b"startbegin\n0:h\n0:i\nend\n" + DONE

    asyncio.run(run())


def test_what_waits_for_a_slow_reader_goes_out_in_one_write() -> None:
    async def run() -> None:
        bed = Bed(max_tokens=None)
        writing = asyncio.create_task(write(bed, lag=0.05))
        for _ in range(50):
            bed.sinks[0].token(LETTER_H, None, None)
            await asyncio.sleep(0)
        bed.sinks[0].token(LETTER_I, None, Finish(0, "length"))
        written = await writing
        assert len(written) < 7
        assert b"".join(written).count(b"0:h\n") == 50

    asyncio.run(run())


def test_a_leaving_client_ends_the_stream_and_aborts_what_lives() -> None:
    async def run() -> None:
        bed = Bed(n=2)
        bed.sinks[0].token(LETTER_H, None, Finish(0, "length"))
        written = await write(bed, gone)
        assert DONE not in written
        assert bed.client.aborted == [1]
        assert bed.closed == [bed.answer]
        assert bed.metrics.ended_by_reason == {"stop": 0, "length": 1, "abort": 1, "error": 0}
        bed.answer.close()
        assert (bed.client.aborted, len(bed.closed)) == ([1], 1)

    asyncio.run(run())


def test_an_error_comes_after_the_deltas_before_it() -> None:
    async def run() -> None:
        bed = Bed(n=2)
        bed.sinks[0].token(LETTER_H, None, None)
        bed.sinks[1].failed(UnavailableError("the engine died"))
        written = b"".join(await write(bed))
        before, _, error = written.partition(b"0:h\n")
        assert before and b"the engine died" in error and error.endswith(DONE)
        assert bed.client.aborted == [0]

    asyncio.run(run())


def test_a_bug_in_the_text_of_one_request_is_that_requests_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run() -> None:
        bed = Bed()
        monkeypatch.setattr(bed.sinks[0].stream, "push", lambda *args: 1 / 0)
        bed.sinks[0].token(LETTER_H, None, None)  # does not raise into the others' loop
        with pytest.raises(PagedServeError, match="text could not be made$"):
            await bed.answer.collect()
        assert bed.client.aborted == [0]

    asyncio.run(run())


def test_a_bug_in_a_dialect_is_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        bed = Bed()
        bed.sinks[0].token(LETTER_H, None, Finish(0, "length"))
        monkeypatch.setattr(Plain, "delta", lambda *args: 1 / 0)
        written = b"".join(await write(bed))
        assert b'"type":"server_error"' in written and b"division" not in written
        assert written.endswith(DONE)

    asyncio.run(run())


def test_reading_tells_a_plain_handler_of_the_disconnect() -> None:
    async def run() -> None:
        bed = Bed()
        with pytest.raises(ClientGone):
            async with reading(bed.answer, gone):
                await bed.answer.collect()
        assert bed.client.aborted == [0]

    asyncio.run(run())


def test_joined_deltas_say_all_that_the_pieces_say() -> None:
    pieces = [Delta("a", [1], [], []), Delta("b", [2], [], [], "stop", "x")]
    assert joined(pieces) == Delta("ab", [1, 2], [], [], "stop", "x")


def test_text_is_spliced_into_the_envelope_as_json() -> None:
    envelope = Envelope({"id": "x"}, usage=True)
    before, after = envelope.around_text({"index": 0, "text": "@", "logprobs": None}, "@")
    text = 'a"\\\n\x00\u2028😀'
    event = (before + json.dumps(text).encode() + after).decode()
    chunk = json.loads(event.removeprefix("data: ").removesuffix("\n\n"))
    assert chunk == {
        "id": "x",
        "choices": [{"index": 0, "text": text, "logprobs": None}],
        "usage": None,
    }


@pytest.mark.parametrize("char", ["x", "\x00", "😀", '"'])
def test_an_error_body_stays_under_4_kib(char: str) -> None:
    error = RequestError(char * 5000, param=char * 5000)
    response = error_response(error)
    assert len(response.body) < 4096
    assert json.loads(response.body)["error"]["message"]


def test_a_bug_of_ours_is_a_500_of_openais_shape() -> None:
    app = FastAPI()

    @app.get("/bug")
    async def bug() -> None:
        raise ZeroDivisionError("secret")

    app.add_exception_handler(PagedServeError, on_error)
    app.add_exception_handler(Exception, on_bug)

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
            return await http.get("/bug")

    answer = asyncio.run(run())
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal" and "secret" not in answer.text
