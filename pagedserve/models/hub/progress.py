"""How far a download is, in words: files, bytes, rate, time left. No torch here."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

TELL_SECONDS = 0.5
WINDOW_SECONDS = 10.0  # over which the rate is taken


class Progress:
    """Counts what arrives, in several threads, and tells it in the one that asks.

    `bytes_done` counts what was there before as well; the rate counts what arrived. `tell` gets the
    words, the bytes done and all bytes.
    """

    def __init__(
        self, tell: Callable[[str, int, int], None], clock: Callable[[], float] = time.monotonic
    ):
        self.files = self.files_done = 0
        self.num_bytes = self.bytes_done = 0
        self._waiting = 0  # for other processes
        self._waits_since = 0.0
        self._tell = tell
        self._clock = clock
        self._told = float("-inf")
        self._text = ""
        self._arrived = 0
        self._samples: deque[tuple[float, int]] = deque([(clock(), 0)])
        self._lock = threading.Lock()

    def expect(self, files: int, num_bytes: int) -> None:
        """So many more files and bytes are to come."""
        with self._lock:
            self.files += files
            self.num_bytes += num_bytes

    def found(self, num_bytes: int) -> None:
        """Bytes that were there already; negative: they have to come again."""
        with self._lock:
            self.bytes_done += num_bytes

    def arrived(self, num_bytes: int) -> None:
        """Bytes from the network."""
        with self._lock:
            self.bytes_done += num_bytes
            self._arrived += num_bytes

    def waits(self, change: int) -> None:
        """One file more (1) or less (-1) that another process is fetching."""
        with self._lock:
            if not self._waiting:
                self._waits_since = self._clock()
            self._waiting += change

    def finished(self) -> None:
        """A file is whole."""
        with self._lock:
            self.files_done += 1

    def report(self) -> None:
        """Tell how far it is, unless that was told a moment ago and more is to come."""
        now = self._clock()
        if now < self._told + TELL_SECONDS and self.files_done < self.files:
            return
        self._told, last = now, self._text
        self._samples.append((now, self._arrived))
        while len(self._samples) > 2 and self._samples[0][0] < now - WINDOW_SECONDS:
            self._samples.popleft()
        self._text = self.text()
        if self._text != last:
            self._tell(self._text, self.bytes_done, self.num_bytes)

    def rate(self) -> float:
        """Bytes a second, lately."""
        (begin, before), (now, arrived) = self._samples[0], self._samples[-1]
        return (arrived - before) / (now - begin) if now > begin else 0.0

    def text(self) -> str:
        """For people: `3/12 files, 1.2 of 16.1 GB (7 %), 85 MB/s, 2:55 left`."""
        share = 100 * self.bytes_done // self.num_bytes if self.num_bytes else 100
        text = f"{self.files_done}/{self.files} files, {part(self.bytes_done, self.num_bytes)}"
        text += f" ({share} %)"
        left, rate = self.num_bytes - self.bytes_done, self.rate()
        if left > 0 and rate > 0:
            text += f", {size(rate)}/s, {duration(left / rate)} left"
        if self._waiting:
            waited = duration(self._clock() - self._waits_since)
            text += f", waiting {waited} for another process that fetches the same"
        return text


def size(num_bytes: float) -> str:
    """`16.1 GB`; powers of a thousand, as file sizes are given."""
    unit, value = scale(num_bytes)
    return f"{num_bytes / value:.3g} {unit}" if value > 1 else f"{num_bytes:.0f} B"


def part(done: float, total: float) -> str:
    """`1.2 of 16.1 GB`, both in the unit of the total."""
    _, value = scale(total)
    digits = 1 if value > 1 else 0
    return f"{done / value:.{digits}f} of {total / value:.{digits}f} {scale(total)[0]}"


def scale(num_bytes: float) -> tuple[str, int]:
    """The unit for so many bytes, and its value."""
    for unit, value in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= value:
            return unit, value
    return "B", 1


def duration(seconds: float) -> str:
    """`2:55` or `1:02:55`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
