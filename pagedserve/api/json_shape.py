"""What a body's JSON is built of, counted on its bytes: before a parser makes an object of any.

    {"a": [1, "]["]}  ─ without strings ─▶  {: [1, ]}  ─ brackets, of one kind ─▶  [[]]

An object or array takes two bytes on the wire and eighty in memory, so a body that is short enough
may still be far too much; and a parser that nests by recursion ends where its stack does.
"""

from __future__ import annotations

from collections.abc import Iterator

from pagedserve.errors import RequestError
from pagedserve.limits import Limits

NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
ONE_KIND = bytes.maketrans(b"{}", b"[]")
PIECE_BYTES = 256 << 10  # other threads have their turn between pieces


def check_shape(body: bytes, limits: Limits) -> None:
    """Raise RequestError where `body` nests deeper, or has more containers, than `limits` say.

    Of JSON that is not well formed nothing is said: that is the parser's.
    """
    brackets = body.translate(ONE_KIND, NO_BRACKETS)
    if brackets.count(b"[") <= min(limits.json_depth, limits.json_containers):
        return  # even with those inside of strings
    brackets = b"".join(outside_strings(body)).translate(ONE_KIND, NO_BRACKETS)
    if (number := brackets.count(b"[")) > limits.json_containers:
        raise RequestError(
            f"the body has {number} JSON objects and arrays; at most {limits.json_containers} are "
            "allowed",
            code="json_too_large",
        )
    if deeper_than(limits.json_depth, brackets):
        raise RequestError(
            f"the body nests JSON objects and arrays deeper than {limits.json_depth}, which is the "
            "most that is allowed",
            code="json_too_deep",
        )


def outside_strings(body: bytes) -> Iterator[bytes]:
    """What of `body` is not inside of strings, in order, in pieces."""
    # What is left of a run of backslashes escapes what follows it.
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    inside = False
    for at in range(0, len(plain), PIECE_BYTES):
        parts = plain[at : at + PIECE_BYTES].split(b'"')
        yield b"".join(parts[inside::2])
        inside ^= len(parts) % 2 == 0


def deeper_than(depth: int, brackets: bytes) -> bool:
    """Whether `brackets`, of one kind, nest deeper. False where they do not match each other."""
    for _ in range(depth):  # each round takes away the innermost level
        fewer = brackets.replace(b"[]", b"")
        if len(fewer) == len(brackets):
            return False
        brackets = fewer
    return bool(brackets)
