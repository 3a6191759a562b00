"""The HTTP surface on bare sockets: what is no HTTP, what is nearly, and what smuggles.

Connections carry valid requests bent in their bytes, floods of headers, odd chunks, pipelines, and
the shapes by which one parser sees two requests where another sees one. No answer is a 5xx, the
server goes on serving, and whoever is told to go is let go of.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import select
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from hypothesis import strategies as st

from tests.api.serving import Server
from tests.reliability.bending import BITS, bent, bent_bytes, fuzz, json_bytes
from tests.text.building import byte_level, write_checkpoint

HOST = b"Host: localhost\r\n"
JSON = b"Content-Type: application/json\r\n"
BODY = {"prompt": "hello", "max_tokens": 2}
STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
LOOK_SECONDS = 0.002  # for an answer that may come; what is not answered costs this much
NUM_OPEN = 24  # connections at a time, so that waiting for one is not waiting for all
HOSTILE_HEADERS = [
    b"Content-Length: 5, 6\r\n", b"Content-Length: -1\r\n", b"Content-Length: 0x10\r\n",
    b"Content-Length: 99999999999999999999999\r\n", b"Content-Length:\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: gzip, chunked\r\n",
    b"Transfer-Encoding: chunked, identity\r\n", b"Transfer-Encoding : chunked\r\n",
    b"Expect: 100-continue\r\n", b"Connection: upgrade\r\nUpgrade: h2c\r\n",
    b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: x\r\n",
    b"X-A: b\r\n c: folded\r\n", b" X-Leading: space\r\n", b"No colon here\r\n", b": no name\r\n",
    b"X-Null: a\x00b\r\n", b"X-Bin: \xff\xfe\r\n", b"Host: other\r\n", b"X-Bare: a\nX-LF: b\r\n",
    b"X-Request-Timeout: nan\r\n", b"X-Request-Id: " + b"y" * 500 + b"\r\n",
    b"X-Many: 1\r\n" * 300, b"Cookie: " + b"c" * 9000 + b"\r\n", b"Origin: null\r\n",
    b"Content-Encoding: gzip\r\n", b"Range: bytes=0-1\r\n", b"Trailer: X-T\r\n",
]  # fmt: skip
TARGETS = [b"/v1/completions", b"/v1/chat/completions", b"/metrics", b"/v1/models", b"/health"]
TARGETS += [b"/", b"*", b"//", b"/%00", b"/v1/../metrics", b"http://x/v1/models", b"/\xff"]
TARGETS += [b"/v1/models/" + b"z" * 3000, b"/v1/models/%2e%2e", b"/?" + b"q=1&" * 100, b"x"]
METHODS = [
    b"POST",
    b"GET",
    b"HEAD",
    b"PUT",
    b"OPTIONS",
    b"CONNECT",
    b"TRACE",
    b"PRI",
    b"post",
    b"\x16",
]


def request(r: random.Random) -> bytes:
    """One request: valid, or odd in a part or two."""
    body = json_bytes(BODY if r.random() < 0.5 else bent(BODY, r, 2))
    odd = r.random()
    target = r.choice(TARGETS) if odd < 0.3 else TARGETS[0]
    method = r.choice(METHODS) if odd < 0.2 else b"POST"
    version = r.choice([b"HTTP/1.0", b"HTTP/2.0", b"HTTP/9", b"", b"RTSP/1.0"])
    version = version if odd < 0.05 else b"HTTP/1.1"
    extra = b"".join(r.choices(HOSTILE_HEADERS, k=r.choice([0, 0, 1, 2])))
    head = method + b" " + target + b" " + version + b"\r\n" + HOST + JSON + extra
    if r.random() < 0.3:
        return head + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(body, r)
    length = len(body) if r.random() < 0.9 else r.choice([0, 1, len(body) - 1, len(body) + 9])
    return head + b"Content-Length: %d\r\n\r\n" % max(0, length) + body


def chunked(body: bytes, r: random.Random) -> bytes:
    """`body` in chunks, some of them as no client writes them."""
    cut = r.randrange(len(body) + 1)
    sizes = [b"%x", b"0%x", b"%X;ext=1", b"%x ", b"0x%x", b"-%x", b"%x;" + b"e" * 400, b"+%x"]
    made = b""
    for part in (body[:cut], body[cut:]):
        if part or r.random() < 0.1:
            size = r.choice(sizes) if r.random() < 0.2 else sizes[0]
            made += size % len(part) + b"\r\n" + part + r.choice([b"\r\n"] * 9 + [b"", b"\n"])
    ends = [b"0\r\n\r\n"] * 6 + [
        b"0\r\nX-Trailer: t\r\n\r\n",
        b"00\r\n\r\n",
        b"",
        b"fffffffffffffffff\r\n",
    ]
    return made + r.choice(ends)


def connection(r: random.Random) -> tuple[bytes, int]:
    """All that one connection sends, and how many requests that were."""
    kind = r.random()
    if kind < 0.1:
        return r.randbytes(r.choice([1, 20, 400])) + r.choice([b"", b"\r\n\r\n", *BITS]), 1
    count = r.choice([1, 1, 2, 6])
    data = b"".join(request(r) for _ in range(count))
    return (bent_bytes(data, r, r.choice([1, 2, 5])) if kind > 0.6 else data), count


class Prober:
    """Sends what connections say and judges what comes back."""

    def __init__(self, server: Server):
        self.server = server
        url = httpx.URL(server.url)
        self.place = (url.host, url.port)
        self.statuses: Counter[str] = Counter()
        self.open: list[socket.socket] = []

    def probe(self, data: bytes, r: random.Random) -> str:
        """Send; what the first answer was. Older connections are looked at, and let go."""
        sock = socket.create_connection(self.place)
        sock.settimeout(10)
        try:
            cut = r.randrange(len(data) + 1) if r.random() < 0.2 else len(data)
            sock.sendall(data[:cut])
            if data[cut:]:
                sock.sendall(data[cut:])
            if r.random() < 0.2:
                sock.shutdown(socket.SHUT_WR)
        except OSError:  # it closed before it had everything
            self.statuses["closed early"] += 1
        self.open.append(sock)
        if len(self.open) > NUM_OPEN:
            self.leave(self.open.pop(0))
        return self.look(sock)

    def look(self, sock: socket.socket) -> str:
        """Take what has come. Whatever it is, it is no 5xx."""
        readable, _, _ = select.select([sock], [], [], LOOK_SECONDS)
        if not readable:
            return "nothing yet"
        try:
            data = sock.recv(1 << 20)
        except OSError:
            return "reset"
        found = STATUS.findall(data)
        assert all(int(status) < 500 for status in found), data[:2000]
        return found[0].decode() if found else "closed" if not data else "the rest"

    def leave(self, sock: socket.socket) -> None:
        while self.look(sock) not in ("nothing yet", "closed", "reset"):
            pass
        sock.close()

    def check_it_serves(self) -> None:
        answer = self.server.http.post("/v1/completions", json=BODY)
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 2


@pytest.fixture
def prober(tmp_path: Path) -> Iterator[Prober]:
    directory = write_checkpoint(tmp_path / "checkpoint", byte_level())
    with Server(tmp_path / "log", model=str(directory)) as server:
        yield Prober(server.until_ready())


@pytest.mark.parametrize("cases", [2_000, pytest.param(1_000_000, marks=pytest.mark.marathon)])
def test_whatever_comes_over_a_socket_the_server_goes_on(cases: int, prober: Prober) -> None:
    num_requests = 0

    def outcome(seed: int, r: random.Random) -> str:
        nonlocal num_requests
        data, count = connection(r)
        num_requests += count
        if r.random() < 0.002:
            prober.check_it_serves()
        return prober.probe(data, r)

    outcomes = fuzz("http", cases, st.just(0), outcome)
    for sock in prober.open:
        prober.leave(sock)
    assert outcomes["200"] and outcomes["400"] and num_requests > cases
    prober.check_it_serves()
    for name in ("open_requests", "live_sequences", "queue_requests"):
        prober.server.wait_for(name, 0)
    assert prober.server.process.poll() is None
    assert "Traceback" not in prober.server.output, prober.server.output[-3000:]


HIDDEN = b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\n" + HOST + JSON
WHOLE = json.dumps(BODY).encode()
LENGTH = b"Content-Length: %d\r\n" % (len(WHOLE) + len(HIDDEN))
SMUGGLED = {
    "a length and chunks": LENGTH + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + HIDDEN,
    "chunks and a length": b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n"
    + HIDDEN,
    "two lengths": b"Content-Length: 0\r\n" + LENGTH + b"\r\n" + WHOLE + HIDDEN,
    "chunks in disguise": LENGTH + b"Transfer-Encoding: xchunked\r\n\r\n" + WHOLE + HIDDEN,
    "a space before the colon": b"Transfer-Encoding : chunked\r\n"
    + LENGTH
    + b"\r\n"
    + WHOLE
    + HIDDEN,
    "a folded header": b"X-A: b\r\n Transfer-Encoding: chunked\r\n"
    + LENGTH
    + b"\r\n"
    + WHOLE
    + HIDDEN,
    "a folded length": b"Content-Length:\r\n 0\r\n\r\n" + HIDDEN,
    "a bare line feed": b"X-A: b\nContent-Length: 0\r\n\r\n" + HIDDEN,
    "a size that overflows": b"Transfer-Encoding: chunked\r\n\r\n1" + b"0" * 16 + b"\r\n" + HIDDEN,
    "a size with a sign": b"Transfer-Encoding: chunked\r\n\r\n+0\r\n\r\n" + HIDDEN,
    "chunked twice": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n"
    + HIDDEN,
}


@pytest.mark.parametrize("shape", SMUGGLED)
def test_nothing_is_smuggled_in_a_body(shape: str, shared: Server) -> None:
    """What two parsers may read differently is refused and the connection closed, or is one request
    whose body the server does not run."""
    url = httpx.URL(shared.url)
    with socket.create_connection((url.host, url.port)) as sock:
        sock.settimeout(1)
        sock.sendall(POST + SMUGGLED[shape])
        received = b""
        with contextlib.suppress(TimeoutError, ConnectionResetError):  # it may wait for more
            while data := sock.recv(1 << 16):
                received += data
    assert len(STATUS.findall(received)) <= 1, received
    assert b'"version"' not in received, "the hidden request was answered"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    place = tmp_path_factory.mktemp("shared")
    directory = write_checkpoint(place / "checkpoint", byte_level())
    with Server(place / "log", model=str(directory)) as server:
        yield server.until_ready()
