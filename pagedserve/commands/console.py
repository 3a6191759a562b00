"""Standard output, for people: lines, and one line that is rewritten while something goes on."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import time

from pagedserve.errors import PagedServeError

PLAIN_SECONDS = 5.0  # between lines of progress where none can be rewritten
PERCENT = re.compile(r"(\d+) %")
LEAST_BAR_CHARS, MOST_BAR_CHARS = 6, 24


class Console:
    """Says lines. One that begins with a carriage return is progress: it replaces the last such.

    On a terminal that happens in place, with a bar where the line has a percentage. Anywhere else a
    line of progress is an ordinary one, and not more than one in five seconds is said.
    """

    def __init__(self) -> None:
        self._progress = False  # the cursor stands behind a line of progress
        self._said = float("-inf")

    def __call__(self, line: str) -> None:
        if not line.startswith("\r"):
            self.end()
            write(f"{line}\n")
        elif on_terminal():
            width = shutil.get_terminal_size().columns - 1
            write(f"\r\x1b[K{with_bar(line[1:], width)}")
            self._progress = True
        elif (now := time.monotonic()) >= self._said + PLAIN_SECONDS:
            self._said = now
            write(f"{line[1:]}\n")

    def end(self) -> None:
        """Leave a line of progress standing."""
        if self._progress:
            write("\n")
        self._progress = False


def with_bar(line: str, width: int) -> str:
    """A line of progress in at most `width` columns, with a bar where it has a place."""
    found, room = PERCENT.search(line), min(width - len(line) - len(" []"), MOST_BAR_CHARS)
    if found is None or room < LEAST_BAR_CHARS:
        return line[:width]
    done = room * min(int(found[1]), 100) // 100
    return f"{line} [{'#' * done}{'.' * (room - done)}]"


def on_terminal() -> bool:
    """Whether a line can be rewritten."""
    return sys.stdout.isatty()


def say(line: str) -> None:
    """A line, at once."""
    write(f"{line}\n")


def write(text: str) -> None:
    """Text as it comes. Raises PagedServeError where standard output takes no more."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # a reader that has enough, such as `head`: nothing to complain of
        raise
    except OSError as error:
        drop_output()
        raise PagedServeError(
            f"cannot write to standard output: {error.strerror or error}"
        ) from error


def drop_output() -> None:
    """Send what is still buffered nowhere: the interpreter's last flush would fail once more."""
    with contextlib.suppress(OSError):  # no file at all, as in tests
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
