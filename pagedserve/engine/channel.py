"""How the API process and the engine process talk: one socket pair, framed msgpack, no pickle.

    API ── Configure, Submit, Abort, Control ──▶ engine
    API ◀── Progress, Ready, Outputs, Failed, Stats, Dead ── engine

A frame is a 4-byte little-endian length and one msgpack message. Messages are columns of builtins,
one message a step. `send` never blocks: what the socket will not take waits in memory and goes out
with the next `flush`, so a slow reader cannot stop the engine. A closed peer is `ChannelClosed`.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
from collections import deque
from typing import Any

import msgspec

from pagedserve.errors import PagedServeError
from pagedserve.request import Request
from pagedserve.step import TokenLogprobs

HEADER = struct.Struct("<I")
READ_BYTES = 1 << 20
# What the decoder raises: its own; for text that is no UTF-8; for nesting past the stack; and what
# the checks of a SamplingParams raise.
NO_MESSAGE = (msgspec.MsgspecError, ValueError, RecursionError, PagedServeError)


class ChannelClosed(Exception):
    """The other process is gone."""


class ChannelBroken(ChannelClosed):
    """The other process sent what is no message; nothing it says can be trusted any more."""


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of everything that crosses."""


class Configure(Message, frozen=True):
    """First message: the configuration as flat builtins, the model resolved to a directory."""

    options: dict[str, Any]


class Submit(Message, frozen=True):
    """New requests, in order of arrival."""

    requests: list[Request]


class Abort(Message, frozen=True):
    """Requests nobody waits for any more; unknown ids are ignored, so sending twice is harmless."""

    ids: list[int]


class Control(Message, frozen=True):
    """An order that is no request: "reset_prefix_cache" or "shutdown"."""

    name: str


class Progress(Message, frozen=True):
    """A start-up phase has begun, or goes on; `seconds`: since the engine process started.

    `detail` says for people how far it is, `bytes_done` of `bytes_total` where it moves bytes.
    """

    phase: str
    seconds: float
    detail: str = ""
    bytes_done: int = 0
    bytes_total: int = 0


class Ready(Message, frozen=True):
    """The engine serves. What was settled from the model and from memory.

    `stall_seconds`: silence after which it counts as stalled; 0 is never.
    """

    vocab_size: int
    max_model_len: int
    num_blocks: int
    block_size: int
    max_num_seqs: int
    eos_token_ids: list[int]
    device: str
    dtype: str
    seconds: float
    stall_seconds: float = 0.0


class Finish(Message, frozen=True):
    """Sequence `id` ended; `reason` is a `FinishReason`, `stop_token` the id that ended it."""

    id: int
    reason: str
    stop_token: int | None = None


class Outputs(Message, frozen=True):
    """What one step produced. `token_ids[i]` is the next token of request `ids[i]`.

    `started`: (id, tokens found in the prefix cache) of requests that are first scheduled now, sent
    before their first step is launched. `logprobs` is empty or parallel to `ids`.
    `prompt_logprobs`: (id, those of the prompt tokens that follow the ones computed in this step).
    """

    ids: list[int]
    token_ids: list[int]
    finished: list[Finish] = []
    logprobs: list[TokenLogprobs | None] = []
    prompt_logprobs: list[tuple[int, list[TokenLogprobs]]] = []
    started: list[tuple[int, int]] = []


class Failed(Message, frozen=True):
    """Request `id` cannot go on: the error is its own, everything else runs on."""

    id: int
    message: str


class Stats(Message, frozen=True):
    """Gauges and running totals, for /metrics; and the loop's sign of life, also when idle."""

    running: int
    waiting: int
    blocks_total: int
    blocks_used: int
    preemptions: int
    prefix_queries: int
    prefix_hits: int
    steps: int
    broken_steps: int = 0  # that had to be computed again, see `engine.isolation`


class Dead(Message, frozen=True):
    """The engine cannot go on; `cause` is the one line that says why."""

    cause: str


AnyMessage = (
    Configure | Submit | Abort | Control | Progress | Ready | Outputs | Failed | Stats | Dead
)


class Channel:
    """One end of the socket pair. Not thread-safe: each end belongs to one thread."""

    def __init__(self, sock: socket.socket):
        sock.setblocking(False)
        self._sock = sock
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(AnyMessage)
        self._incoming = bytearray()
        self._outgoing: deque[memoryview] = deque()

    @staticmethod
    def pair() -> tuple[Channel, socket.socket]:
        """Our end, and the other end's socket to hand to a child process."""
        ours, theirs = socket.socketpair()
        return Channel(ours), theirs

    def fileno(self) -> int:
        """For select and asyncio."""
        return self._sock.fileno()

    @property
    def pending(self) -> bool:
        """True while bytes wait for the socket to take them."""
        return bool(self._outgoing)

    def send(self, message: Message) -> None:
        """Queue `message` and push out what the socket takes. Raises ChannelClosed."""
        payload = self._encoder.encode(message)
        self._outgoing.append(memoryview(HEADER.pack(len(payload)) + payload))
        self.flush()

    def flush(self) -> None:
        """Push out what waits, without blocking. Raises ChannelClosed."""
        while self._outgoing:
            chunk = self._outgoing[0]
            try:
                sent = self._sock.send(chunk)
            except BlockingIOError:
                return
            except OSError as error:
                raise ChannelClosed(str(error)) from error
            if sent < len(chunk):
                self._outgoing[0] = chunk[sent:]
            else:
                self._outgoing.popleft()

    def receive(self, timeout: float | None = 0.0) -> list[AnyMessage]:
        """All complete messages; waits up to `timeout` seconds (None: for ever) for the first.

        Flushes while it waits. Raises ChannelClosed when the peer is gone and nothing is left.
        """
        messages = self._drain()
        if not messages and timeout != 0.0:
            writers = [self] if self._outgoing else []
            _, writable, _ = select.select([self], writers, [], timeout)
            if writable:
                with contextlib.suppress(ChannelClosed):  # after what the peer said last
                    self.flush()
            messages = self._drain()
        return messages

    def close(self) -> None:
        """Close the socket; the peer sees ChannelClosed."""
        self._sock.close()

    def _drain(self) -> list[AnyMessage]:
        closed = False
        while True:
            try:
                data = self._sock.recv(READ_BYTES)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                closed = True
                break
            self._incoming += data
            if len(data) < READ_BYTES:
                break
        messages = self._parse()
        if closed and not messages:
            raise ChannelClosed("the other process closed the channel")
        return messages

    def _parse(self) -> list[AnyMessage]:
        messages: list[AnyMessage] = []
        view, at = memoryview(self._incoming), 0
        while len(view) - at >= HEADER.size:
            (length,) = HEADER.unpack_from(view, at)
            if len(view) - at - HEADER.size < length:
                break
            start = at + HEADER.size
            try:
                messages.append(self._decoder.decode(view[start : start + length]))
            except NO_MESSAGE as error:
                raise ChannelBroken(f"the other process sent no message: {error}") from error
            at = start + length
        view.release()
        del self._incoming[:at]
        return messages
