"""What a process of the server writes to standard error: warnings and errors, nobody's secrets.

    record ─▶ message, traceback ─▶ quotations cut (client's text) ─▶ keys hidden ─▶ standard error

Keys are known by their SHA-256 only, so every piece of a line that could be one is hashed and
looked up. What foreign code says in an exception may quote what a client sent: of a traceback only
short quotations are kept, unless prompts are logged on purpose.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
from collections.abc import Callable, Iterator
from urllib.parse import unquote_to_bytes

from pagedserve.errors import shorten

HIDDEN = "[hidden]"
REQUESTS = "pagedserve.requests"  # the logger of what clients ask, where that is wanted
MAX_LINE_CHARS = 400  # of a traceback
MAX_PATH_CHARS = 200  # in an access line
MAX_CHARS = 16 << 10  # of a whole record: nobody shall buy seconds with a line to be hashed
MAX_KEY_CHARS = 1024
MAX_QUOTED_CHARS = 32
MAX_EDGES = 12  # in one piece of a line that is taken for a key

# An Authorization header in the forms in which code shows headers, and credentials without one.
HEADER = re.compile(
    r"(authorization\b['\"]?\s*[:=,]\s*b?['\"]?\s*)((?:[a-z]+\s+)?)[^\s'\",)\]}]+", re.IGNORECASE
)
BEARER = re.compile(r"(\bbearer\s+)[^\s'\",)\]}]+", re.IGNORECASE)
FRAME = re.compile(r'\s+(\| +)?File "[^"]+", line \d+(, in \S+)?$')
WORD = re.compile(r"\S+")
EDGE = re.compile(r"[^\w-]")  # what may stand before or behind a key, or in it
QUOTED = re.compile(rf"(['\"])(?:\\.|(?!\1).){{{MAX_QUOTED_CHARS + 1},}}\1")
QUOTED_OR_OPEN = re.compile(rf"{QUOTED.pattern[:-2]}(?:\1|$)")

IsKey = Callable[[bytes], bool]  # of a SHA-256


def no_keys(digest: bytes) -> bool:
    """For a process that knows none."""
    return False


class Redacting(logging.Formatter):
    """Formats records without keys, and without long quotations in tracebacks."""

    def __init__(self, form: str, is_key: IsKey = no_keys, *, quote: bool = False):
        super().__init__(form)
        self._is_key = is_key
        self._quote = quote

    def format(self, record: logging.LogRecord) -> str:
        # Tracebacks come from `formatException` below; a cached one is of another's making.
        record.exc_text = None
        return redacted(super().format(record), self._is_key)

    def formatException(self, ei: object) -> str:  # noqa: N802  # the library's name
        text = super().formatException(ei)  # type: ignore[arg-type]
        return text if self._quote else "\n".join(map(without_quotations, text.splitlines()))


def without_quotations(line: str) -> str:
    """A line of a traceback without what it quotes at length; where it happened stays."""
    if FRAME.match(line):
        return line
    if len(line) > MAX_LINE_CHARS:
        # With an end for what the cut leaves open.
        line = QUOTED_OR_OPEN.sub(r"\1…\1", line[:MAX_LINE_CHARS])
        return f"{line}…"
    return QUOTED.sub(r"\1…\1", line)


def redacted(text: str, is_key: IsKey = no_keys) -> str:
    """`text` with every key that `is_key` knows, and every Authorization value, hidden."""
    text = HEADER.sub(rf"\1\2{HIDDEN}", bounded(text))
    text = BEARER.sub(rf"\1{HIDDEN}", text)
    if is_key is no_keys:
        return text
    return WORD.sub(lambda found: without_keys(found[0], is_key), text)


def bounded(text: str) -> str:
    """`text` without its middle, if it is long: a traceback says at its end what happened."""
    half = MAX_CHARS // 2
    return text if len(text) <= MAX_CHARS else f"{text[:half]}\n…\n{text[-half:]}"


def without_keys(word: str, is_key: IsKey) -> str:
    """`word` with each piece between two edges that is a key hidden, the longest first."""
    edges = [found.span() for found in EDGE.finditer(word)]
    starts = [0, *(end for _, end in edges)]
    ends = [*(start for start, _ in edges), len(word)]
    pieces = {
        word[start:end]
        for at, start in enumerate(starts)
        for end in ends[at : at + MAX_EDGES]
        if start < end <= start + MAX_KEY_CHARS
    }
    for piece in sorted(pieces, key=len, reverse=True):
        forms = [as_bytes(piece)]
        if "%" in piece:  # as in a URL
            forms.append(unquote_to_bytes(forms[0]))
        if any(is_key(hashlib.sha256(each).digest()) for each in forms):
            word = word.replace(piece, HIDDEN)
    return word


def as_bytes(text: str) -> bytes:
    """`text` as it would go over a wire, whatever it holds."""
    return text.encode("utf-8", "surrogatepass")


@contextlib.contextmanager
def to_standard_error(is_key: IsKey = no_keys, *, prompts: bool = False) -> Iterator[None]:
    """Inside, what is logged goes to standard error: warnings and worse, `prompts` if wanted."""
    handler = logging.StreamHandler()
    handler.setFormatter(Redacting("%(message)s", is_key, quote=prompts))
    root, requests = logging.getLogger(), logging.getLogger(REQUESTS)
    root.addHandler(handler)
    requests.setLevel(logging.INFO if prompts else logging.NOTSET)
    try:
        yield
    finally:
        root.removeHandler(handler)
        requests.setLevel(logging.NOTSET)


@contextlib.contextmanager
def access_to_standard_error(is_key: IsKey = no_keys) -> Iterator[None]:
    """Inside, uvicorn's line for each request goes there too, without the query: we have none."""
    handler = logging.StreamHandler()
    handler.setFormatter(Redacting("%(asctime)s %(message)s", is_key))
    handler.addFilter(without_query)
    logger = logging.getLogger("uvicorn.access")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
        logger.propagate = True


def without_query(record: logging.LogRecord) -> bool:
    """Take what follows the question mark out of an access record: (client, method, path, …)."""
    if isinstance(record.args, tuple) and len(record.args) > 2:
        client, method, path, *rest = record.args
        record.args = (client, method, shorten(str(path).partition("?")[0], MAX_PATH_CHARS), *rest)
    return True
