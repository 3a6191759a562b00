"""A server on a socket that answers every completion as a test says, byte for byte."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
NOT_FOUND = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"  # to every GET
DONE = b"data: [DONE]\n\n"

Write = Callable[[bytes], None]
Answer = Callable[[Write, dict[str, Any]], None]  # what it writes, given the request's JSON body


class Misbehaving:
    """Listens while the block runs; one thread a connection, closed when `answer` returns."""

    def __init__(self, answer: Answer):
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.heads: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Misbehaving:
        self._threads.append(threading.Thread(target=self._accept))
        self._threads[0].start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._threads.append(threading.Thread(target=self._serve, args=[connection]))
                self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            head, body = self._read(connection)
            if head.startswith("GET"):
                connection.sendall(NOT_FOUND)
                return
            with self._lock:
                self.heads.append(head)
                self.bodies.append(body)
            self._answer(connection.sendall, body)

    def _read(self, connection: socket.socket) -> tuple[str, dict[str, Any]]:
        data = b""
        while b"\r\n\r\n" not in data:
            data += connection.recv(1 << 16)
        head, _, body = data.partition(b"\r\n\r\n")
        found = re.search(rb"(?i)content-length: *(\d+)", head)
        while found and len(body) < int(found[1]):
            body += connection.recv(1 << 16)
        return head.decode(), json.loads(body or b"{}")


def chunk(data: bytes) -> bytes:
    """A chunk of HTTP's chunked encoding."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def piece(space: str = "") -> bytes:
    """An event with one choice; `space` is what stands after colons."""
    choice = {"index": 0, "text": 'say "choices":[{ aloud', "finish_reason": None}
    return f'data: {{"choices":{space}[{json.dumps(choice)}]}}\n\n'.encode()


def usage(tokens: int) -> bytes:
    """The event that counts."""
    counts = json.dumps({"prompt_tokens": 4, "completion_tokens": tokens})
    return f'data: {{"choices":[],"usage":{counts}}}\n\n'.encode()


def whole(write: Write, body: dict[str, Any]) -> None:
    """A right answer, a token a write."""
    write(HEAD)
    for _ in range(body["max_tokens"]):
        write(chunk(piece()))
    write(chunk(usage(body["max_tokens"])) + chunk(DONE) + b"0\r\n\r\n")


class Counted:
    """A right answer, slowly, and how many are being written at a time."""

    def __init__(self) -> None:
        self.most = 0
        self._now = 0
        self._lock = threading.Lock()

    def __call__(self, write: Write, body: dict[str, Any]) -> None:
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
        time.sleep(0.03)
        with self._lock:
            self._now -= 1  # before the end is written: then the client may send the next
        whole(write, body)
