"""uvicorn's HTTP protocol with a bound on what stands before a body: request line and headers.

    bytes ─▶ BoundedHeads (counts while a head is open) ─▶ httptools ─▶ application

Neither uvicorn nor httptools has such a bound, and both keep a head in memory until it is complete:
before any route, key or body limit is asked.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from pagedserve.api.openai_shapes import error_response
from pagedserve.errors import RequestError
from pagedserve.limits import Limits


class BoundedHeads(HttpToolsProtocol):
    """Answers 431 and closes where a request's head is longer than `max_bytes`.

    A head that begins in the same read as the end of another request (pipelining) is counted from
    the next read on: it may be longer by that one read. What follows the chunks of a chunked body
    (trailers) is counted as a head too.
    """

    max_bytes = Limits().head_bytes
    _in_head = True
    _num_heads = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._room = self.max_bytes

    def data_received(self, data: bytes) -> None:
        while data and not self.transport.is_closing():
            # One read may hold a short head and much body: an open head gets no more than its room.
            size = self._room if self._in_head else len(data)
            self._feed(data[:size])
            data = data[size:]

    def on_headers_complete(self) -> None:
        self._close_head()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._open_head()
        super().on_message_complete()

    def on_chunk_header(self) -> None:
        """The last chunk has no body: trailers follow it."""
        self._open_head()

    def on_body(self, body: bytes) -> None:
        self._close_head()
        super().on_body(body)

    def _feed(self, piece: bytes) -> None:
        open_before, number = self._in_head, self._num_heads
        super().data_received(piece)
        if open_before and self._in_head and number == self._num_heads:
            self._room -= len(piece)
            if self._room == 0:
                self._refuse()

    def _open_head(self) -> None:
        self._in_head, self._room = True, self.max_bytes
        self._num_heads += 1

    def _close_head(self) -> None:
        self._in_head = False

    def _refuse(self) -> None:
        # Into an answer that is under way nothing can be written: the client just loses it.
        if self.cycle is None or self.cycle.response_complete:
            self.transport.write(refusal(self.max_bytes, self.server_state.default_headers))
        self.transport.close()


def bounded_heads(max_bytes: int) -> type[BoundedHeads]:
    """The protocol with another bound; uvicorn makes its objects itself."""
    return type("BoundedHeads", (BoundedHeads,), {"max_bytes": max_bytes})


def refusal(max_bytes: int, default_headers: list[tuple[bytes, bytes]]) -> bytes:
    """The 431 as it goes over the wire."""
    error = RequestError(
        f"the request line and headers are longer than {max_bytes} bytes",
        code="headers_too_large",
    )
    error.status = 431
    response = error_response(error)
    response.headers["Connection"] = "close"
    lines = [name + b": " + value for name, value in [*default_headers, *response.raw_headers]]
    return STATUS_LINE[431] + b"\r\n".join(lines) + b"\r\n\r\n" + bytes(response.body)
