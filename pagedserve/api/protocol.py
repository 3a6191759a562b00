"""uvicorn's HTTP protocol with bounds on what stands before a body: its length and its time.

    bytes ─▶ BoundedHeads (counts while a head is open) ─▶ httptools ─▶ application

Neither uvicorn nor httptools has such a bound, and both keep a head in memory until it is complete:
before any route, key or body limit is asked.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from pagedserve.api.openai_shapes import error_response
from pagedserve.errors import RequestError
from pagedserve.limits import Limits

HEAD_SECONDS = 30.0  # for request line and headers, and for the first byte of a connection


class BoundedHeads(HttpToolsProtocol):
    """Answers 431 and closes where a request's head is longer than `max_bytes`, 408 where it takes
    longer than `seconds`, 400 where it is no HTTP.

    A head that begins in the same read as the end of another request (pipelining) is counted from
    the next read on: it may be longer by that one read. What follows the chunks of a chunked body
    (trailers) is counted as a head too.
    """

    max_bytes = Limits().head_bytes
    seconds = HEAD_SECONDS
    _in_head = True
    _in_message = False
    _num_heads = 0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._cycles: list[RequestResponseCycle] = []  # answered now, and pipelined behind that
        self._room = self.max_bytes
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._end_cycles()
        super().connection_lost(exc)

    def eof_received(self) -> None:
        """The transport closes itself behind this."""
        self._end_cycles()

    def data_received(self, data: bytes) -> None:
        while data and not self.transport.is_closing():
            # One read may hold a short head and much body: an open head gets no more than its room.
            size = self._room if self._in_head else len(data)
            self._feed(data[:size])
            data = data[size:]

    def on_headers_complete(self) -> None:
        self._close_head()
        self._stop_timer()
        self._in_message = True
        super().on_headers_complete()
        self._cycles = [each for each in self._cycles if not each.response_complete]
        if self.cycle is not None and self.cycle not in self._cycles:
            self._cycles.append(self.cycle)

    def on_message_complete(self) -> None:
        self._open_head()
        self._in_message = False
        super().on_message_complete()

    def on_chunk_header(self) -> None:
        """The last chunk has no body: trailers follow it."""
        self._open_head()

    def on_body(self, body: bytes) -> None:
        self._close_head()
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        """What the parser cannot read; it calls this."""
        self._refuse(400, "this is no valid HTTP/1.1 request", "invalid_http")

    def _feed(self, piece: bytes) -> None:
        open_before, number = self._in_head, self._num_heads
        super().data_received(piece)
        if open_before and self._in_head and number == self._num_heads:
            self._room -= len(piece)
            if self._timer is None and not self._in_message:
                self._start_timer()
            if self._room == 0:
                self._refuse(
                    431,
                    f"the request line and headers are longer than {self.max_bytes} bytes",
                    "headers_too_large",
                )

    def _open_head(self) -> None:
        self._in_head, self._room = True, self.max_bytes
        self._num_heads += 1

    def _close_head(self) -> None:
        self._in_head = False

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(self.seconds, self._too_slow)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        if not all(each.response_complete for each in self._cycles):
            self._start_timer()  # an answer is under way: its client may take its time
        elif self._room == self.max_bytes:
            self.transport.close()  # not a byte came, so nothing was asked
        else:
            self._refuse(
                408,
                f"the request line and headers did not come within {self.seconds:g} s",
                "headers_too_slow",
            )

    def _refuse(self, status: int, message: str, code: str) -> None:
        # Into an answer that is under way nothing can be written: the client just loses it.
        if all(each.response_complete for each in self._cycles):
            error = RequestError(message, code=code)
            error.status = status
            self.transport.write(refusal(error, self.server_state.default_headers))
        self._end_cycles()
        self._stop_timer()
        self.transport.close()

    def _end_cycles(self) -> None:
        """Let every answer know that nobody takes it any more, before the transport is closed.

        uvicorn tells the last of pipelined requests only, and that when the loop says the
        connection is lost: until then the others write into a closed transport, which raises.
        """
        for cycle in self._cycles:
            if not cycle.response_complete:
                cycle.disconnected = True
            cycle.message_event.set()


def bounded_heads(max_bytes: int) -> type[BoundedHeads]:
    """The protocol with another bound; uvicorn makes its objects itself."""
    return type("BoundedHeads", (BoundedHeads,), {"max_bytes": max_bytes})


def refusal(error: RequestError, default_headers: list[tuple[bytes, bytes]]) -> bytes:
    """The answer as it goes over the wire."""
    response = error_response(error)
    response.headers["Connection"] = "close"
    lines = [name + b": " + value for name, value in [*default_headers, *response.raw_headers]]
    status = STATUS_LINE[error.status]
    return status + b"\r\n".join(lines) + b"\r\n\r\n" + bytes(response.body)
