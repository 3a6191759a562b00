"""What one token writes, where a decoder of the `tokenizers` library works token by token.

Two families cover almost every checkpoint:

    byte level      each character of a token stands for one byte; all tokens write bytes
    byte fallback   tokens write text, but `<0xE2>` writes one byte of a character that has no token

For these, text is the concatenation of what the tokens write, decoded as UTF-8, and a stream can be
decoded with one dictionary lookup a token. Every other decoder is left to `WindowDetokenizer`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer as Backend

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

Rewrite = Callable[[str], str]


def byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level vocabularies write for each of the 256 bytes.

    Printable Latin-1 stands for itself; the others follow from U+0100 on (GPT-2's table).
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }


class PieceTable:
    """Token id → what it writes, for one decoder. Filled as tokens are met.

    `exact` says whether the decoder is of a family above. Where it is: `byte_level` tells the
    family, `strip_first` how many times `strip_char` may be taken off the beginning of the text,
    and `first_drops` which character the first token does not write at all.
    """

    def __init__(self, backend: Backend):
        self._backend = backend
        self._cache: dict[int, bytes | str | None] = {}
        self._alphabet: dict[str, int] = {}
        self._rewrites: list[Rewrite] = []
        self._falls_back = False
        self.byte_level = False
        self.strip_char, self.strip_first = "", 0
        self.first_drops = ""
        self.exact = self._understand(describe(backend.decoder))

    def piece(self, id: int) -> bytes | str | None:
        """Bytes or text that token `id` writes; None for an id outside the vocabulary."""
        try:
            return self._cache[id]
        except KeyError:
            return self._cache.setdefault(id, self._spell(id))

    def bytes_of(self, id: int) -> bytes:
        """What token `id` writes in the middle of a text, as bytes."""
        if not self.exact:
            return self._backend.decode([id], skip_special_tokens=False).encode()
        piece = self.piece(id) or b""
        return piece.encode() if isinstance(piece, str) else piece

    def first_piece(self, id: int) -> bytes | str | None:
        """As `piece`, for the first token of a text."""
        if not self.first_drops:
            return self.piece(id)
        token = self._backend.id_to_token(id)
        return None if token is None else self._spell_text(token.replace(self.first_drops, ""))

    def _spell(self, id: int) -> bytes | str | None:
        token: str | None = self._backend.id_to_token(id)
        if token is None:
            return None
        if not self.byte_level:
            return self._spell_text(token)
        try:
            return bytes(self._alphabet[char] for char in token)
        except KeyError:  # a token outside the alphabet, such as an added one, writes itself
            return token.encode()

    def _spell_text(self, token: str) -> bytes | str:
        for rewrite in self._rewrites:
            token = rewrite(token)
        if self._falls_back and (match := BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return token

    def _understand(self, decoder: dict[str, Any]) -> bool:
        """Take in the decoder's description; False where it does more than a table can say."""
        steps = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
        if [step.get("type") for step in steps] == ["ByteLevel"]:
            self.byte_level, self._alphabet = True, byte_alphabet()
            return True
        joined = False
        for position, step in enumerate(steps):
            match step:
                case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                    if joined or self._falls_back:
                        return False
                    self._rewrites.append(replacement(old, new))
                case {"type": "Metaspace", "replacement": str(mark)}:
                    if position > 0:
                        return False
                    self._rewrites.append(replacement(mark, " "))
                    self.first_drops = "" if step.get("prepend_scheme") == "never" else mark
                case {"type": "ByteFallback"}:
                    self._falls_back = True
                case {"type": "Fuse"}:
                    joined = True
                case {"type": "Strip", "content": str(char), "start": int(start), "stop": 0}:
                    if not joined or self.strip_first:
                        return False
                    self.strip_char, self.strip_first = char, start
                case _:
                    return False
        return True


def describe(decoder: Any) -> dict[str, Any]:
    """A decoder of the library as JSON data; empty when there is none."""
    description: dict[str, Any] = {} if decoder is None else json.loads(decoder.__getstate__())
    return description


def replacement(old: str, new: str) -> Rewrite:
    """The function that writes `new` for every `old`."""
    return lambda text: text.replace(old, new)
