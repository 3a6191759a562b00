"""Incremental detokenising: a token in, the text that is certain now out.

The contract of every class here: pieces never hold half a character; `push` costs the same however
long the text already is; and the pieces of all tokens, with `finish` at the end, concatenate to
`Tokenizer.decode(all ids)`, or, after a prompt, to what those ids add to the prompt's text. That
differs where a decoder takes a space off the beginning of a text: an answer that goes on from a
prompt keeps its own. One exception, where the library cannot be followed by any stream: when a run
of byte tokens turns out to be invalid UTF-8 it replaces the run's *earlier, complete* characters
too; here they stay.
"""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Sequence
from typing import Protocol

from pagedserve.text.tokenizer import Tokenizer, clean_up

REPLACEMENT = "\ufffd"
CONTEXT_TOKENS = 6  # what a decoder may look back at, for the window
MAX_PENDING_TOKENS = 24  # no character is written by more tokens; past that the text is just bad


def each_byte_replaced(error: UnicodeError) -> tuple[str, int]:
    """Codec error handler: one U+FFFD for every bad byte, as the byte-fallback decoder writes."""
    assert isinstance(error, UnicodeDecodeError)
    return REPLACEMENT * (error.end - error.start), error.end


codecs.register_error("pagedserve.each_byte", each_byte_replaced)
Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer(Protocol):
    """One sequence's tokens to text."""

    def push(self, token_id: int) -> str:
        """The text that is certain once `token_id` follows; often its own, at times nothing."""

    def finish(self) -> str:
        """What is left, with U+FFFD for a character that never became whole."""


def detokenizer(
    tokenizer: Tokenizer, *, skip_special_tokens: bool = True, after: Sequence[int] = ()
) -> Detokenizer:
    """A fresh detokenizer of the kind that `tokenizer` needs, for what follows the ids `after`."""
    kind = PieceDetokenizer if tokenizer.pieces.exact else WindowDetokenizer
    inner: Detokenizer = kind(tokenizer, skip_special_tokens, after)
    return CleaningDetokenizer(inner) if tokenizer.cleans_up else inner


class PieceDetokenizer:
    """For decoders that a table of pieces describes: a lookup and a UTF-8 decoder."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, after: Sequence[int] = ()):
        self._pieces = tokenizer.pieces
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        policy = "replace" if self._pieces.byte_level else "pagedserve.each_byte"
        self._utf8 = Utf8Decoder(policy)
        self._strip = self._pieces.strip_first
        self._first = True
        self._begin(after)

    def _begin(self, after: Sequence[int]) -> None:
        """Go through the beginning of `after`, as far as it decides how later tokens are read."""
        for token_id in after:
            if not self._first and not self._strip:
                break
            self.push(token_id)
        self._utf8.reset()

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        piece = self._pieces.first_piece(token_id) if self._first else self._pieces.piece(token_id)
        if piece is None:
            return ""
        self._first = False
        text = self._utf8.decode(piece) if isinstance(piece, bytes) else self._end_of_run() + piece
        return self._stripped(text) if self._strip else text

    def finish(self) -> str:
        text = self._end_of_run()
        return self._stripped(text) if self._strip else text

    def _end_of_run(self) -> str:
        text = self._utf8.decode(b"", True)
        self._utf8.reset()
        return text

    def _stripped(self, text: str) -> str:
        """`text` without the leading characters that the decoder takes off the whole."""
        rest = text
        while self._strip and rest.startswith(self._pieces.strip_char):
            rest = rest[1:]
            self._strip -= 1
        if rest:
            self._strip = 0
        return rest


class WindowDetokenizer:
    """For any other decoder: decode a short window with and without what is new.

    … emitted │ context │ pending
                └── decode ──┘   minus   decode(context)   =   the new text
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, after: Sequence[int] = ()):
        self._backend = tokenizer.backend
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._context: list[int] = self._last_written(after)
        self._pending: list[int] = []

    def _last_written(self, ids: Sequence[int]) -> list[int]:
        """The last few of `ids` that write anything."""
        writing = (id for id in reversed(ids) if self._writes(id))
        return list(itertools.islice(writing, CONTEXT_TOKENS))[::-1]

    def _writes(self, token_id: int) -> bool:
        # Skipped here and not by the decoder: a window of nothing but skipped tokens has no text to
        # subtract, and decoders treat the first token they see differently.
        return token_id not in self._skipped and self._backend.id_to_token(token_id) is not None

    def push(self, token_id: int) -> str:
        if not self._writes(token_id):
            return ""
        self._pending.append(token_id)
        return self._advance(force=len(self._pending) >= MAX_PENDING_TOKENS)

    def finish(self) -> str:
        return self._advance(force=True) if self._pending else ""

    def _advance(self, *, force: bool) -> str:
        window = self._context + self._pending
        before = self._backend.decode(self._context, skip_special_tokens=False)
        after = self._backend.decode(window, skip_special_tokens=False)
        if not force and (after.endswith(REPLACEMENT) or not after.startswith(before)):
            return ""
        self._context, self._pending = window[-CONTEXT_TOKENS:], []
        return str(after[len(before) :])


class CleaningDetokenizer:
    """Takes spaces off before punctuation, a word or two late.

    Every pattern of `clean_up` begins with a space and holds no second one, but for " ' ", whose
    replacement joins what stands around it. So a cut just before a space goes through no match,
    unless a lone apostrophe stands on either side of it.
    """

    def __init__(self, inner: Detokenizer):
        self._inner = inner
        self._held = ""

    def push(self, token_id: int) -> str:
        self._held += self._inner.push(token_id)
        # The last space is no good: what follows it must be known.
        cut = self._held.rfind(" ", 0, -1)
        while cut > 0 and (self._held[cut + 1] == "'" or self._held.endswith(" '", 0, cut)):
            cut = self._held.rfind(" ", 0, cut)
        if cut <= 0:
            return ""
        text, self._held = self._held[:cut], self._held[cut:]
        return clean_up(text)

    def finish(self) -> str:
        text, self._held = self._held + self._inner.finish(), ""
        return clean_up(text)
