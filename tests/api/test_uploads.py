"""What is still being sent is bounded too: in bytes over all requests, and in time."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest

from pagedserve.api import limits, protocol
from pagedserve.api.admission import BODIES, Admission
from pagedserve.api.gate import Gate
from pagedserve.api.keys import Keys
from pagedserve.api.limits import BodyLimit
from pagedserve.api.server import http_server
from pagedserve.config import ServerConfig
from pagedserve.errors import BusyError, DeadlineError

MAX_BYTES = 1024


class Client:
    """A request whose body comes in pieces, when the test says so."""

    def __init__(self, limit: BodyLimit):
        self.pieces: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.sent: list[dict[str, Any]] = []
        self.answering = asyncio.Event()
        scope = {"type": "http", "headers": []}
        self.task = asyncio.create_task(limit(scope, self.pieces.get, self.send))

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    async def bring(self, size: int, *, more: bool = True) -> None:
        self.pieces.put_nowait({"type": "http.request", "body": b"x" * size, "more_body": more})
        for _ in range(5):
            await asyncio.sleep(0)


async def stream(scope: Any, receive: Any, send: Any) -> None:
    """An application that reads the body, begins an answer, and waits until its client leaves."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    while (await receive())["type"] != "http.disconnect":
        pass


def bed() -> tuple[Admission, BodyLimit]:
    admission = Admission(ServerConfig(max_body_bytes=MAX_BYTES))
    return admission, BodyLimit(stream, MAX_BYTES, admission)


def test_bodies_count_together_until_they_are_answered() -> None:
    async def run() -> None:
        admission, limit = bed()
        clients = [Client(limit) for _ in range(BODIES)]
        for client in clients:
            await client.bring(1000)
        assert admission.body_bytes == 1000 * BODIES
        answered, waits, refused = (Client(limit) for _ in range(3))
        await answered.bring(1024, more=False)
        assert admission.body_bytes == 1000 * BODIES  # it is answered: its bytes are free again
        await waits.bring(1000)
        refused.pieces.put_nowait({"type": "http.request", "body": b"x" * 600, "more_body": True})
        with pytest.raises(BusyError, match="try again later"):
            await refused.task
        assert admission.counts.rejected == {"queue_bytes": 1}
        assert admission.body_bytes == 1000 * (BODIES + 1)
        await clients[0].bring(24, more=False)
        assert admission.body_bytes == 1000 * BODIES
        for client in [*clients[1:], waits]:  # their clients leave
            client.pieces.put_nowait({"type": "http.disconnect"})
            await client.bring(0)
        assert admission.body_bytes == 0
        for client in [*clients, answered, waits]:
            client.pieces.put_nowait({"type": "http.disconnect"})
            await client.task
        assert admission.body_bytes == 0

    asyncio.run(run())


def test_a_body_that_does_not_come_is_a_408_and_a_whole_one_has_no_hurry(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.05)

    async def run() -> None:
        admission, limit = bed()
        slow, whole = Client(limit), Client(limit)
        await slow.bring(10)
        await whole.bring(10, more=False)
        with pytest.raises(DeadlineError, match="did not come within 0.05 s") as caught:
            await slow.task
        assert (caught.value.status, caught.value.code) == (408, "body_timeout")
        assert not whole.task.done() and admission.body_bytes == 0
        whole.pieces.put_nowait({"type": "http.disconnect"})
        await whole.task

    asyncio.run(run())


async def answer(scope: Any, receive: Any, send: Any) -> None:
    """An application that says yes, at once."""
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]}
    )
    await send({"type": "http.response.body", "body": b"ok"})


WHOLE = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize(
    ("writes", "answers"),
    [([], []), ([WHOLE[:-3]], [408]), ([WHOLE, WHOLE[:9], WHOLE[9:20]], [200, 408])],
)
def test_a_head_that_does_not_come_is_given_up(
    writes: list[bytes], answers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol.BoundedHeads, "seconds", 0.5)

    async def run() -> bytes:
        gate = Gate.opened(ServerConfig(port=0), Keys(None, None))
        server = http_server(answer, gate)
        serving = asyncio.create_task(server.serve(sockets=[gate.sock]))
        while not server.started:
            await asyncio.sleep(0.01)
        port = gate.sock.getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        received = b""
        for number, data in enumerate(writes):
            writer.write(data)
            if number == 0 and data == WHOLE:
                received += await reader.readuntil(b"ok")
        received += await asyncio.wait_for(reader.read(), 30)  # until the server closes
        writer.close()
        server.should_exit = True
        await serving
        return received

    received = asyncio.run(run())
    assert [int(status) for status in re.findall(rb"HTTP/1.1 (\d+)", received)] == answers
    assert (b"headers_too_slow" in received) == (408 in answers)
