"""Clients that misbehave, on bare sockets: they leave at any moment, read slowly, or not at all.

    Ask ──▶ behave(url, ask, r) ──▶ how it went, in a word

What a client does read is judged: an answer is whole, and an error is one of the declared ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

CONNECTIONS_RESET = (ConnectionError, asyncio.IncompleteReadError)
DECLARED = {400, 404, 408, 413, 429, 504}
END = b"\r\n\r\n"


@dataclass(frozen=True)
class Ask:
    """A completion to ask for."""

    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)

    def wire(self) -> bytes:
        """The request as bytes; the connection ends with it."""
        body = json.dumps(self.body).encode()
        lines = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Connection: close"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        return "\r\n".join(lines).encode() + END + body

    @property
    def stream(self) -> bool:
        return bool(self.body.get("stream"))


def random_ask(r: random.Random, longest: int = 120) -> Ask:
    """Of every kind: short and long, one choice and several, streamed and not, with a deadline."""
    body: dict[str, Any] = {
        "prompt": r.choice(["12 + 34 = ", "Once upon a time"]) + " fox" * r.choice([0, 5, 80, 250]),
        "max_tokens": r.choice([1, 4, r.randint(1, longest), longest]),
        "ignore_eos": True,
        "temperature": r.choice([0, 1.0]),
        "n": r.choice([1, 1, 1, 2, 4]),
        "stream": r.random() < 0.6,
    }
    if r.random() < 0.1:
        body["prompt"] = [body["prompt"], "The fox"]
    if r.random() < 0.1:
        body |= {"logprobs": 2, "echo": r.random() < 0.5}
    return Ask(body, {"X-Request-Timeout": f"{r.random():.2f}"} if r.random() < 0.1 else {})


def bad_ask(r: random.Random) -> Ask:
    """One that is refused."""
    wrong = r.choice(
        [{"n": 0}, {"max_tokens": -1}, {"prompt": []}, {"nonsense": 1}, {"model": "none"}]
        + [{"prompt": "fox " * 20_000}, {"logit_bias": {"99999999": 1}}, {"stop": ["x"] * 99}]
    )
    return Ask({"prompt": "hi", "max_tokens": 3} | wrong)


class Connection:
    """One to the server; `leave` closes it, or resets it with what is unread."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, url: str) -> Connection:
        parts = urlsplit(url)
        # A small buffer: a client that does not read is felt by the server at once.
        return cls(*await asyncio.open_connection(parts.hostname, parts.port, limit=1 << 12))

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    def leave(self, r: random.Random) -> None:
        sock = self.writer.get_extra_info("socket")
        if r.random() < 0.5 and sock is not None:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


def check_answer(data: bytes, ask: Ask) -> str:
    """What a whole answer is: "answered", "late" or a refusal's status. Fails for any other."""
    head, _, body = data.partition(END)
    status = int(head.split(b" ", 2)[1])
    if status != 200:
        assert status in DECLARED, data[:2000]
        assert json.loads(body)["error"]["code"]
        return str(status)
    if not ask.stream:
        assert all(choice["finish_reason"] for choice in json.loads(body)["choices"])
        return "answered"
    assert data.endswith(b"0\r\n\r\n") and b"data: [DONE]" in body[-40:], data[-2000:]
    if b'data: {"error"' in body:
        assert b'"request_timeout"' in body or b'"queue_timeout"' in body, body[-2000:]
        return "late"
    return "answered"


async def read_whole(connection: Connection, ask: Ask) -> str:
    return check_answer(await connection.reader.read(-1), ask)


# ── ways to behave: each ends with the connection cut, or with a whole answer ─────────────────────


async def leaves_in_its_head(connection: Connection, ask: Ask, r: random.Random) -> None:
    wire = ask.wire()
    await connection.send(wire[: r.randrange(wire.index(END) + 2)])
    await asyncio.sleep(r.choice([0, 0.01]))


async def leaves_in_its_body(connection: Connection, ask: Ask, r: random.Random) -> None:
    wire = ask.wire()
    await connection.send(wire[: r.randrange(wire.index(END) + len(END), len(wire))])
    await asyncio.sleep(r.choice([0, 0.01]))


async def leaves_at_once(connection: Connection, ask: Ask, r: random.Random) -> None:
    await connection.send(ask.wire())


async def leaves_before_its_answer(connection: Connection, ask: Ask, r: random.Random) -> None:
    """While it is tokenised, queued, or its prompt is computed."""
    await connection.send(ask.wire())
    await asyncio.sleep(r.random() * r.choice([0.005, 0.05, 0.5]))


async def leaves_while_it_streams(connection: Connection, ask: Ask, r: random.Random) -> None:
    await connection.send(ask.wire())
    for _ in range(r.randint(1, 20)):
        if not await connection.reader.read(r.choice([1, 300, 5000])):
            break


async def reads_nothing(connection: Connection, ask: Ask, r: random.Random) -> None:
    """With data unread in every buffer between."""
    connection.writer.transport.pause_reading()  # type: ignore[attr-defined]
    await connection.send(ask.wire())
    await asyncio.sleep(r.random() * 1.5)


async def leaves_at_its_end(connection: Connection, ask: Ask, r: random.Random) -> None:
    """With the last token, before the last byte."""
    await connection.send(ask.wire())
    with contextlib.suppress(asyncio.LimitOverrunError):
        await connection.reader.readuntil(b'"finish_reason":"')


async def ends_its_side(connection: Connection, ask: Ask, r: random.Random) -> None:
    """Half a close behind the request, which is no disconnect, or is one: either way it ends."""
    await connection.send(ask.wire())
    connection.writer.write_eof()
    await asyncio.sleep(r.random() * 0.3)


CUTS: list[Callable[[Connection, Ask, random.Random], Awaitable[None]]] = [
    leaves_in_its_head,
    leaves_in_its_body,
    leaves_at_once,
    leaves_before_its_answer,
    leaves_before_its_answer,
    leaves_while_it_streams,
    leaves_while_it_streams,
    reads_nothing,
    leaves_at_its_end,
    ends_its_side,
]


async def cut_short(url: str, ask: Ask, r: random.Random) -> str:
    """A client that leaves in one of these ways; its name."""
    cut = r.choice(CUTS)
    connection = await Connection.open(url)
    try:
        with contextlib.suppress(*CONNECTIONS_RESET):  # the server may be the first to close
            await cut(connection, ask, r)
    finally:
        connection.leave(r)
    return cut.__name__


async def patient(url: str, ask: Ask, r: random.Random) -> str:
    """A client that reads all there is; the kind of its answer."""
    connection = await Connection.open(url)
    try:
        await connection.send(ask.wire())
        return await read_whole(connection, ask)
    finally:
        connection.leave(r)


async def slow(url: str, ask: Ask, r: random.Random) -> str:
    """The same, in sips."""
    connection = await Connection.open(url)
    try:
        await connection.send(ask.wire())
        data = b""
        for _ in range(10):
            data += await connection.reader.read(200)
            await asyncio.sleep(0.1)
        return check_answer(data + await connection.reader.read(-1), ask)
    finally:
        connection.leave(r)
