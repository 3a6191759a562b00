"""One file on its way from a hub into its cache: resumed, and compared with its hash.

    <etag>.incomplete   grows, over as many connections and processes as it takes
    <etag>              appears whole, by a rename

A lock on the unfinished file keeps two processes from writing it at once. Which files are wanted,
and what they are for, is not known here.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from pagedserve.errors import StartupError
from pagedserve.models.hub.progress import Progress, part, size

FILES_AT_ONCE = 4
CHUNK_BYTES = 1 << 20
SILENCE_SECONDS = 20.0  # without a byte, until a connection counts as cut
ATTEMPTS = 5  # in a row that bring no byte
FIRST_WAIT_SECONDS = 0.5  # before the second attempt; doubles
TRANSIENT = (408, 429, 500, 502, 503, 504)
WATCH_SECONDS = 0.1  # how soon an interrupt is noticed


class Stopped(Exception):
    """Another file failed, or the process is ending."""


@dataclass(slots=True)
class Fetch:
    """A file of `num_bytes` at `url`, to become `blob`.

    `etag`: its SHA-256 (64 digits), or its git blob id (SHA-1 of a head and the bytes).
    """

    name: str
    url: str
    etag: str
    num_bytes: int
    blob: Path
    progress: Progress
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Fetch what is missing, compare the hash, put the file in its place.

        Raises StartupError when the connection is cut for good or the bytes are not those of the
        hash, and what the HTTP client raises for an answer that no repetition would change.
        """
        self.blob.parent.mkdir(parents=True, exist_ok=True)
        if self.blob.exists() and self.blob.stat().st_size != self.num_bytes:
            self.blob.unlink()  # cut off by others; the snapshots' links go on leading here
        if not self.blob.exists():
            with self.owned() as file:
                if not self.blob.exists():  # else another process was faster
                    self.fill(file)
                    self.incomplete.replace(self.blob)
                    self.progress.finished()
                    return
                self.incomplete.unlink(missing_ok=True)
        self.progress.found(self.num_bytes)
        self.progress.finished()

    @property
    def incomplete(self) -> Path:
        """The unfinished file."""
        return self.blob.with_name(f"{self.etag}.incomplete")

    @contextlib.contextmanager
    def owned(self) -> Iterator[FileIO]:
        """The unfinished file, opened to append, and locked for this process."""
        with self.incomplete.open("ab", buffering=0) as file:
            if not locked(file):
                self.progress.waits(1)
                while not locked(file):
                    self.pause(WATCH_SECONDS)
                self.progress.waits(-1)
            yield file

    def fill(self, file: FileIO) -> None:
        """Bring `file` to its full length and compare the hash."""
        if length(file) > self.num_bytes:
            file.truncate(0)
        self.progress.found(length(file))
        digest = self.digest(file)
        failures = 0
        while (have := length(file)) < self.num_bytes:
            error = None
            try:
                digest = self.stream(file, digest)
            except Exception as caught:
                if not transient(caught):
                    raise
                error = caught
            failures = 0 if length(file) > have else failures + 1
            if failures == ATTEMPTS:
                raise StartupError(
                    f"the connection broke off at {part(have, self.num_bytes)} of {self.name} "
                    f"({said(error)}); run the same again: it goes on from there"
                ) from error
            if length(file) < self.num_bytes:
                self.pause(FIRST_WAIT_SECONDS * 2**failures)
        if digest.hexdigest() != self.etag:
            got = length(file)
            file.truncate(0)
            raise StartupError(
                f"{self.name} arrived damaged: its {size(got)} are not those the hub lists (hash "
                f"{digest.hexdigest()[:12]}, not {self.etag[:12]}); run the same again"
            )

    def stream(self, file: FileIO, digest: Any) -> Any:
        """Append what one connection brings; the hash of all there is."""
        from huggingface_hub import get_session
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            hf_raise_for_status,
        )

        have = length(file)
        headers = build_hf_headers() | {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        with get_session().stream(
            "GET", self.url, headers=headers, timeout=SILENCE_SECONDS
        ) as response:
            if response.status_code >= 400:
                response.read()
            hf_raise_for_status(response)
            if have and response.status_code != 206:  # the whole file, from its beginning
                file.truncate(0)
                self.progress.found(-have)
                digest = self.digest(file)
            for chunk in response.iter_bytes():  # as it comes: what is collected is lost by a cut
                if self.stop.is_set():
                    raise Stopped
                write(file, chunk)
                digest.update(chunk)
                self.progress.arrived(len(chunk))
        return digest

    def digest(self, file: FileIO) -> Any:
        """A hash of the kind that `etag` is, over what `file` holds by now."""
        if len(self.etag) == 64:
            digest = hashlib.sha256()
        else:
            digest = hashlib.sha1(f"blob {self.num_bytes}\0".encode(), usedforsecurity=False)
        with self.incomplete.open("rb") as begun:
            while chunk := begun.read(CHUNK_BYTES):
                digest.update(chunk)
        return digest

    def pause(self, seconds: float) -> None:
        """Wait. Raises Stopped when there is nothing to wait for any more."""
        if self.stop.wait(seconds):
            raise Stopped


def fetch_all(fetches: list[Fetch], watch: Callable[[], None]) -> None:
    """Run several at once; `watch` is called meanwhile, and when all are done.

    The first failure stops the others and is raised. The threads are daemons, which do not keep an
    interrupted process alive.
    """
    stop, queue = threading.Event(), deque(fetches)
    failed: deque[BaseException] = deque()

    def work() -> None:
        with contextlib.suppress(IndexError):  # the queue is empty
            while not stop.is_set():
                fetch = queue.popleft()
                fetch.stop = stop
                try:
                    fetch.run()
                except BaseException as error:
                    failed.append(error)
                    stop.set()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(FILES_AT_ONCE)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(WATCH_SECONDS)
                watch()
        watch()
    finally:
        stop.set()
    if failed:
        raise failed[0]


def transient(error: Exception) -> bool:
    """Whether the same request may succeed in a moment."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in TRANSIENT
    return isinstance(error, client_error())


def client_error() -> type[Exception]:
    """The root of the errors of huggingface_hub's HTTP client, which is not always the same one."""
    from huggingface_hub.errors import HfHubHTTPError

    root: type[Exception] = HfHubHTTPError.__bases__[0]
    return root


def said(error: Exception | None) -> str:
    """A short reason."""
    return "it ended early" if error is None else f"{type(error).__name__}: {str(error)[:100]}"


def locked(file: FileIO) -> bool:
    """Take the lock on `file`, if no other process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def length(file: FileIO) -> int:
    """Bytes of an open file."""
    return os.fstat(file.fileno()).st_size


def write(file: FileIO, chunk: bytes) -> None:
    """Write all of `chunk`: a raw file may take only a part of it."""
    rest = memoryview(chunk)
    while rest:
        rest = rest[file.write(rest) :]
