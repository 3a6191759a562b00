"""tiktoken's format: a line a token, its bytes in base64 and its rank, which is its id.

Of all neighbours whose bytes together are a token, the pair of the lowest rank is merged first; a
piece that is a token as a whole stays whole. How a text is cut into pieces no file of this format
says: it must come with the settings (`split_pattern`).
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from pagedserve.errors import StartupError
from pagedserve.text.files import added_tokens
from pagedserve.text.formats import byte_level
from pagedserve.text.formats.vocabulary import add_specials, place_tail
from pagedserve.text.pieces import byte_alphabet

FIRST_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?\n")


def is_rank_file(file: Path) -> bool:
    """Whether `file` begins as this format does, whatever its name. Raises StartupError."""
    try:
        with file.open("rb") as opened:
            return FIRST_LINE.match(opened.read(4096)) is not None
    except OSError as error:
        raise StartupError(f"{file} cannot be read: {error.strerror}") from error


def load(file: Path, config: dict[str, Any]) -> tuple[Backend, dict[str, Any]]:
    """The tokenizer in `file`, and its settings. Raises StartupError."""
    if not config.get("split_pattern"):
        raise StartupError(
            f"{file} does not say how texts are split, and tokenizer_class "
            f"{config.get('tokenizer_class')!r} is not known; give a directory with a "
            "tokenizer.json of this model with --tokenizer"
        )
    ranks = read(file)
    tail = tail_tokens(max(ranks.values(), default=-1) + 1, config)
    return build(file, ranks, config, tail=tail)


def build(
    file: Path,
    ranks: dict[bytes, int],
    config: dict[str, Any],
    *,
    tail: Iterable[str] = (),
    first: Sequence[str] = (),
    add_bos: bool = False,
) -> tuple[Backend, dict[str, Any]]:
    """The tokenizer of `ranks`, and its settings.

    Special tokens stand in `first`, before the ranks, which begin behind them, or in the `tail`.
    Raises StartupError naming `file`.
    """
    spell = {byte: char for char, byte in byte_alphabet().items()}
    spelled = {token: "".join(map(spell.__getitem__, token)) for token in ranks}
    vocabulary = {text: id for id, text in enumerate(first)}
    vocabulary |= {spelled[token]: len(first) + rank for token, rank in ranks.items()}
    place_tail(vocabulary, tail)
    merges = [(spelled[left], spelled[right]) for left, right in pairs(ranks)]
    backend, config = byte_level.build(
        file, vocabulary, merges, config, whole_pieces=True, add_bos=add_bos
    )
    add_specials(backend, [*first, *tail], words_alone=True)
    return backend, config


def read(file: Path) -> dict[bytes, int]:
    """Rank by bytes. Raises StartupError naming the line that is none."""
    ranks: dict[bytes, int] = {}
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise StartupError(f"{file} cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise StartupError(f"{file}: line {number} is not a token and its rank") from error
    if len(set(ranks.values())) != len(ranks):
        raise StartupError(f"{file}: a rank stands for more than one token")
    return ranks


def pairs(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every pair of tokens that make a token, in the order of its rank.

    A token may come of several pairs; they meet in one place only in runs of equal bytes, which
    are merged from the left: the longer left part first.
    """
    found = []
    for token in sorted(ranks, key=ranks.__getitem__):
        for cut in range(len(token) - 1, 0, -1):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                found.append((left, right))
    return found


def tail_tokens(first: int, config: dict[str, Any]) -> list[str]:
    """The special tokens of the ids from `first` on."""
    tail = list(config.get("tail_tokens") or ())
    count, name = config.get("tail_names") or (0, "")
    given = {id: token.content for id, token in added_tokens(config)}
    start = first + len(tail)
    return tail + [given.get(start + at, name.format(at=at, id=start + at)) for at in range(count)]
