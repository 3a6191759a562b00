"""The client processes of a run: requests dealt out, one common start, outcomes collected."""

from __future__ import annotations

import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO
from urllib.parse import urlsplit

import msgspec

from pagedserve.commands.bench.client import READY, Job, Plan
from pagedserve.commands.bench.figures import Outcome
from pagedserve.errors import PagedServeError

PROCESSES = 4
LEAD_SECONDS = 0.05  # from the order to start to the start: the processes wake up together


@dataclass(frozen=True, slots=True)
class Target:
    """Who is asked. `url` is the server's, with or without /v1."""

    url: str
    api_key: str | None = None
    timeout: float = 600.0

    @property
    def root(self) -> str:
        """The URL without a slash at its end and without /v1."""
        return self.url.rstrip("/").removesuffix("/v1")

    def plan(self, jobs: list[Job], concurrency: int) -> Plan:
        """What one process gets. Raises PagedServeError for a URL that is none."""
        parts = urlsplit(self.root)
        try:
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise PagedServeError(f"{self.url}: {error}") from error
        if parts.scheme not in ("http", "https") or host is None:
            raise PagedServeError(f"{self.url} is no URL such as http://127.0.0.1:8000")
        lines = [f"POST {parts.path}/v1/completions HTTP/1.1", f"Host: {parts.netloc}"]
        if self.api_key is not None:
            lines.append(f"Authorization: Bearer {self.api_key}")
        lines += ["Content-Type: application/json", "Connection: close", "Content-Length: "]
        return Plan(
            host=host,
            port=port or (443 if parts.scheme == "https" else 80),
            tls=parts.scheme == "https",
            head="\r\n".join(lines).encode(),
            concurrency=concurrency,
            timeout=self.timeout,
            jobs=jobs,
        )


def drive(
    target: Target,
    jobs: Sequence[Job],
    *,
    concurrency: int | None = None,
    processes: int = PROCESSES,
) -> list[Outcome]:
    """Send `jobs`, at most `concurrency` at a time (None: all), and return their outcomes in order.

    Job i goes to process i modulo their number; the concurrency is dealt out among them. Raises
    PagedServeError where a process of ours fails; requests that fail are outcomes.
    """
    limit = max(1, min(concurrency or len(jobs), len(jobs)))
    count = max(1, min(processes, limit))
    plans = [
        target.plan(list(jobs[k::count]), limit // count + (k < limit % count))
        for k in range(count)
    ]
    children: list[subprocess.Popen[bytes]] = []
    try:
        for plan in plans:
            children.append(child())
            data = msgspec.msgpack.encode(plan)
            tell(children[-1], struct.pack("<Q", len(data)) + data)
        if any(pipe(each.stdout).read(len(READY)) != READY for each in children):
            raise PagedServeError("a client process ended before the start")
        start = struct.pack("<d", time.monotonic() + LEAD_SECONDS)
        for each in children:
            tell(each, start)
        outcomes: list[Outcome | None] = [None] * len(jobs)
        for k, each in enumerate(children):
            outcomes[k::count] = collect(each)
    finally:
        for each in children:
            each.kill()
            each.wait()
            pipe(each.stdin).close()
            pipe(each.stdout).close()
    return [each for each in outcomes if each is not None]


def child() -> subprocess.Popen[bytes]:
    """A client process. Ctrl-C does not reach it: `drive` ends it."""
    return subprocess.Popen(
        [sys.executable, "-m", "pagedserve.commands.bench.client"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )


def tell(each: subprocess.Popen[bytes], data: bytes) -> None:
    """Write to a process."""
    try:
        pipe(each.stdin).write(data)
        pipe(each.stdin).flush()
    except BrokenPipeError as error:
        raise PagedServeError("a client process ended before the start") from error


def collect(each: subprocess.Popen[bytes]) -> list[Outcome]:
    """Wait for a process and read its outcomes."""
    data = pipe(each.stdout).read()
    if (status := each.wait()) != 0:
        raise PagedServeError(f"a client process failed with status {status}; its error is above")
    return msgspec.msgpack.decode(data, type=list[Outcome])


def pipe(stream: IO[bytes] | None) -> IO[bytes]:
    """A pipe that was asked for."""
    assert stream is not None, "the process was started without this pipe"
    return stream
