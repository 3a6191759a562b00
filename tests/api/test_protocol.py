"""What stands before a body is bounded, whoever sends it and however it is cut into writes."""

from __future__ import annotations

import json
import socket
import time

import httpx
import pytest

from pagedserve.limits import Limits
from tests.api.serving import Server

MAX_HEAD_BYTES = Limits().head_bytes
END = b"\r\n\r\n"
LENGTH = b"content-length:"


def connect(server: Server) -> socket.socket:
    url = httpx.URL(server.url)
    sock = socket.create_connection((url.host, url.port))
    sock.settimeout(10)
    return sock


def head(size: int) -> bytes:
    """A GET whose head has `size` bytes."""
    start = b"GET /version HTTP/1.1\r\nHost: localhost\r\nX-Long: "
    return start + b"x" * (size - len(start) - len(END)) + END


def all_from(sock: socket.socket) -> bytes:
    """Everything until the server closes."""
    received = b""
    try:
        while data := sock.recv(1 << 20):
            received += data
    except ConnectionResetError:  # it closed with bytes of ours unread
        pass
    return received


def one_answer(sock: socket.socket) -> bytes:
    """The next answer with its body, which comes in a write of its own."""
    received = b""
    while END not in received:
        received += sock.recv(1 << 16)
    lines, _, body = received.partition(END)
    (length,) = (int(line[15:]) for line in lines.split(b"\r\n") if line[:15] == LENGTH)
    while len(body) < length:
        body += sock.recv(1 << 16)
    return lines + END + body


def check_refusal(received: bytes) -> None:
    lines, _, body = received.partition(END)
    assert lines.startswith(b"HTTP/1.1 431 ")
    assert b"connection: close" in lines.lower()
    assert f"content-length: {len(body)}".encode() in lines
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("invalid_request_error", "headers_too_large")
    assert str(MAX_HEAD_BYTES) in error["message"]


def send_until_closed(sock: socket.socket, piece: bytes, times: int) -> int:
    """How many pieces went out; a closed connection takes no more."""
    for sent in range(times):
        try:
            sock.sendall(piece)
        except OSError:
            return sent
        time.sleep(0)
    return times


@pytest.mark.parametrize("begin", [b"X-Long: ", b"", b"GET /"])
def test_a_head_without_end_is_cut_off(begin: bytes, server: Server) -> None:
    """One long value, many short headers, a long path: 200 MB of each."""
    piece = b"a: b\r\n" * 10_000 if not begin else b"x" * 60_000
    with connect(server) as sock:
        sock.sendall(begin if begin.startswith(b"GET") else b"GET / HTTP/1.1\r\n" + begin)
        assert send_until_closed(sock, piece, 3300) < 1000
    assert server.http.get("/version").status_code == 200


@pytest.mark.parametrize("cut", [None, 1000])
def test_a_head_past_the_limit_is_a_431(cut: int | None, server: Server) -> None:
    data = head(MAX_HEAD_BYTES + 1)
    with connect(server) as sock:
        for at in range(0, len(data), cut or len(data)):
            sock.sendall(data[at : at + (cut or len(data))])
        check_refusal(all_from(sock))


def test_heads_up_to_the_limit_are_taken_again_and_again(server: Server) -> None:
    with connect(server) as sock:
        for _ in range(3):
            sock.sendall(head(MAX_HEAD_BYTES))
            assert one_answer(sock).startswith(b"HTTP/1.1 200")
        sock.sendall(head(MAX_HEAD_BYTES + 1))
        check_refusal(all_from(sock))


def test_bodies_are_not_counted_as_heads(server: Server) -> None:
    body = json.dumps({"prompt": "hi", "max_tokens": 1, "user": "x" * 300_000}).encode()
    start = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    )
    whole = start + b"Content-Length: %d" % len(body) + END + body
    chunks = b"".join(
        b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:70_000], body[70_000:])
    )
    chunked = start + b"Transfer-Encoding: chunked" + END + chunks + b"0\r\n\r\n"
    with connect(server) as sock:
        for data in (whole, chunked, whole):
            sock.sendall(data)
            assert one_answer(sock).startswith(b"HTTP/1.1 200")


def test_trailers_are_counted(server: Server) -> None:
    start = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    with connect(server) as sock:
        sock.sendall(start + b"2\r\n{}\r\n0\r\n")
        assert send_until_closed(sock, b"X-Trailer: y\r\n" * 1000, 1000) < 900
    assert server.http.get("/version").status_code == 200


def test_many_pipelined_requests_are_no_long_head(server: Server) -> None:
    one = b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connect(server) as sock:
        sock.sendall(one * 5000)
        received = b""
        while received.count(b"HTTP/1.1 200") < 5000:
            data = sock.recv(1 << 20)
            assert data, received[-300:]
            received += data
