"""Bytes of files onto a device: read by several threads into a ring of pinned buffers, copied on.

    file ──▶ thread ──▶ buffer ─┐
    file ──▶ thread ──▶ buffer ─┼─▶ one stream ──▶ where the tensor stays
    file ──▶ thread ──▶ buffer ─┘
                ▲          │ its copy is over
                └──────────┘

A device copies from pinned memory several times as fast as from other memory, and while the host
goes on; but pinning costs more time than copying, so a few buffers are pinned and used again. One
thread cannot read as fast as a device takes. The copies are enqueued by the caller, on the stream
that everything else of a start runs on: what is done to a tensor after its `read` sees it whole,
without a wait. A buffer is filled again once the event behind its last copy has come.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pagedserve.models.shards import Files, Stored

THREADS = 8
BUFFERS = 2 * THREADS  # so that the threads read on while as many buffers are being copied
BUFFER_BYTES = 4 << 20
# A tensor that is awaited at once is cut finer, so that all threads have a part of it.
LEAST_PIECE = 256 << 10
PAGE = 4096


class Uploads(Protocol):
    """How a device gets bytes. All calls come from one thread."""

    def buffer(self, num_bytes: int) -> Tensor:
        """Host memory [num_bytes] uint8 that the device copies from by itself."""
        ...

    def copy(self, into: Tensor, buffer: Tensor) -> Mark:
        """Enqueue it: both [n] uint8, `into` on the device. The mark is passed once it is done."""
        ...


class Mark(Protocol):
    """A point in what a device does."""

    def synchronize(self) -> None:
        """Wait until the device has passed it."""
        ...


class CudaUploads:
    """By the current stream of a GPU, from pinned memory."""

    def buffer(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def copy(self, into: Tensor, buffer: Tensor) -> Mark:
        into.copy_(buffer, non_blocking=True)
        mark = torch.cuda.Event()  # type: ignore[no-untyped-call]
        mark.record()
        return mark


@dataclass(slots=True)
class Buffer:
    """`mark`: behind the copy that reads from it last."""

    memory: Tensor
    mark: Mark | None = None

    def await_copy(self) -> None:
        """Wait until it may be filled, or let go of."""
        if self.mark is not None:
            self.mark.synchronize()
            self.mark = None


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a file on its way. `read` ends when `memory`, a buffer's beginning, is filled."""

    read: Future[None]
    buffer: Buffer
    memory: Tensor
    into: Tensor


class Ring:
    """Reads files as `Files` does, into memory of a device.

    It holds `buffers · buffer_bytes` of pinned memory from its first read until it is closed.
    """

    def __init__(
        self,
        uploads: Uploads,
        *,
        threads: int | None = None,
        buffers: int = BUFFERS,
        buffer_bytes: int = BUFFER_BYTES,
    ):
        self._files, self._uploads = Files(), uploads
        self._threads = threads or min(THREADS, len(os.sched_getaffinity(0)))
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="weights")
        self._buffer_bytes = buffer_bytes
        self._unmade = buffers
        self._free: deque[Buffer] = deque()  # those whose copies are over first
        self._coming: deque[Piece] = deque()

    def read(self, stored: Stored, into: Tensor, *, skip: int = 0, later: bool = False) -> None:
        """Fill `into`, contiguous on the device, with bytes of `stored` from its byte `skip` on.

        Whatever is enqueued on the stream afterwards finds them there; with `later`, what is after
        the next `settle`, and the threads go on with the next tensor. Raises StartupError as
        `Files.read` does, now or at a later call.
        """
        if into.numel() == 0:
            return
        whole = into.view(-1).view(torch.uint8)
        if not later and len(whole) <= min(LEAST_PIECE, self._buffer_bytes):
            self._read_here(stored, whole, skip)
            return
        piece_bytes = self._buffer_bytes if later else self._share(len(whole))
        # What is wanted now goes past what is not.
        mine = self._coming if later else deque[Piece]()
        try:
            for first, last in pieces(len(whole), piece_bytes):
                buffer = self._next(mine)
                memory = buffer.memory[: last - first]
                read = self._pool.submit(self._files.read, stored, memory, skip=skip + first)
                mine.append(Piece(read, buffer, memory, whole[first:last]))
            while not later and mine:
                self._copy_oldest(mine)
        except BaseException:
            self._abandon(mine)
            raise

    def _read_here(self, stored: Stored, into: Tensor, skip: int) -> None:
        """By this thread: a few bytes would wait longer for another."""
        buffer = self._next(deque())
        memory = buffer.memory[: len(into)]
        try:
            self._files.read(stored, memory, skip=skip)
            buffer.mark = self._uploads.copy(into, memory)
        finally:
            self._free.append(buffer)

    def settle(self) -> None:
        """Enqueue the copies of all that was read. Raises StartupError."""
        try:
            while self._coming:
                self._copy_oldest(self._coming)
        except BaseException:
            self._abandon()
            raise

    def check(self) -> None:
        """Raise StartupError where a file changed while it was read."""
        self._files.check()

    def close(self) -> None:
        """End the threads, close the files, let go of the buffers."""
        self._abandon()
        self._pool.shutdown()
        self._files.close()
        while self._free:
            self._free.popleft().await_copy()

    def _share(self, num_bytes: int) -> int:
        """A piece of so many bytes that are awaited: one for each thread, if that is much."""
        share = -(-num_bytes // self._threads)
        return min(max(-(-share // PAGE) * PAGE, LEAST_PIECE), self._buffer_bytes)

    def _next(self, mine: deque[Piece]) -> Buffer:
        """A buffer that nobody uses any more. `mine`: pieces that hold some and matter more."""
        for queue in (mine, self._coming):
            while queue and queue[0].read.done():
                self._copy_oldest(queue)
        if self._unmade:
            self._unmade -= 1
            return Buffer(self._uploads.buffer(self._buffer_bytes))
        if not self._free:
            self._copy_oldest(mine or self._coming)
        buffer = self._free.popleft()
        buffer.await_copy()
        return buffer

    def _copy_oldest(self, queue: deque[Piece]) -> None:
        """Wait until it is read, and enqueue its copy. Raises what reading it raised."""
        piece = queue[0]
        piece.read.result()
        piece.buffer.mark = self._uploads.copy(piece.into, piece.memory)
        self._free.append(queue.popleft().buffer)

    def _abandon(self, mine: Iterable[Piece] = ()) -> None:
        """Forget what is on its way, once no thread writes to a buffer any more."""
        lost = {id(piece): piece for piece in (*mine, *self._coming)}.values()
        wait([piece.read for piece in lost if not piece.read.cancel()])
        self._free.extend(piece.buffer for piece in lost)
        self._coming.clear()


def pieces(num_bytes: int, piece_bytes: int) -> Iterator[tuple[int, int]]:
    """First byte and the one after the last, of each piece."""
    for first in range(0, num_bytes, piece_bytes):
        yield first, min(first + piece_bytes, num_bytes)
