"""Sentencepiece's format: one protobuf with pieces, scores and how texts are normalised.

    text ─ normalise ─ spaces become ▁ ─ ▁ in front ─ user-defined pieces apart ─ BPE or unigram

What the library does is said again in `tokenizers`' terms, so that texts between special tokens get
the same ids. BPE merges the neighbours whose joined piece has the highest score; here every pair
that makes a piece is a merge, ranked by the piece's score.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from pagedserve.errors import StartupError
from pagedserve.text.files import flag
from pagedserve.text.formats.sentencepiece_proto import Algorithm, Kind, Model, Piece, read
from pagedserve.text.formats.vocabulary import Vocabulary, add_specials, place_added, surround

MARK = "▁"  # what stands for a space in pieces
ALL = 1 << 16  # more spaces than a text begins with
# The text of a byte's piece, written out, is no byte: a cut after its first character says so.
BYTE_AS_TEXT = "<(?=0x[0-9A-F]{2}>)"


def load(file: Path, config: dict[str, Any]) -> tuple[Backend, dict[str, Any]]:
    """The tokenizer in `file`, and its settings. Raises StartupError."""
    model = read(file)
    check(model, file)
    config = own_specials(model) | config
    tail = list(config.get("tail_tokens") or ())
    pieces = with_added(model.pieces, tail, config)
    if not flag(config, "add_prefix_space", True):
        model.dummy_prefix = False
    try:
        backend = Backend(algorithm(dataclasses.replace(model, pieces=pieces)))
        backend.normalizer = normalizers.Sequence(normalizing(model))
    except Exception as error:  # the library raises bare Exception
        raise StartupError(f"{file} cannot be used: {error}") from error
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        prefixing(model, every_part=flag(config, "legacy", True)) + splitting(model, pieces)
    )
    backend.decoder = decoders.Sequence(decoding(model))
    add_specials(backend, [p.text for p in pieces if p.kind is Kind.CONTROL])
    add_specials(backend, tail, words_alone=True)
    surround(backend, config, add_bos=True)
    return backend, config


def check(model: Model, file: Path) -> None:
    """Raise StartupError for what is not done here; no known language model asks for it."""
    unused = any(piece.kind is Kind.UNUSED for piece in model.pieces)
    unsupported = {
        f"its model type {model.algorithm.name}": model.algorithm
        not in (Algorithm.UNIGRAM, Algorithm.BPE),
        "treat_whitespace_as_suffix": model.whitespace_suffix,
        "escape_whitespaces false": not model.escapes_spaces,
        "a denormalizer": model.denormalizes,
        "unused pieces": unused,
    }
    found = [name for name, is_so in unsupported.items() if is_so]
    if found:
        raise StartupError(
            f"{file}: {', '.join(found)} is not supported; give a directory with a tokenizer.json "
            "of this model with --tokenizer"
        )
    if not 0 <= model.unk_id < len(model.pieces):
        raise StartupError(f"{file}: the unknown piece {model.unk_id} is none of its pieces")


def own_specials(model: Model) -> dict[str, Any]:
    """The named special tokens as the file has them."""
    ids = {
        "unk_token": model.unk_id,
        "bos_token": model.bos_id,
        "eos_token": model.eos_id,
        "pad_token": model.pad_id,
    }
    kinds = (Kind.CONTROL, Kind.UNKNOWN)
    return {
        name: model.pieces[id].text
        for name, id in ids.items()
        if 0 <= id < len(model.pieces) and model.pieces[id].kind in kinds
    }


def with_added(pieces: list[Piece], tail: list[str], config: dict[str, Any]) -> list[Piece]:
    """All ids with their pieces: the file's, `tail` behind them, and what the settings name.

    A text has one id: of a piece and a token of the tail that are alike the token stays.
    """
    vocabulary: Vocabulary = {piece.text: id for id, piece in enumerate(pieces)}
    for id, text in enumerate(tail, len(pieces)):
        vocabulary[text] = id
    place_added(vocabulary, config)
    by_id = {id: text for text, id in vocabulary.items()}
    result = []
    for id in range(max(by_id) + 1):
        text = by_id.get(id, f"\0{id}")  # ids that nothing names, and no text holds
        old = pieces[id] if id < len(pieces) else None
        # A new one is found in texts as an added token, not by the algorithm.
        result.append(old if old and old.text == text else Piece(text, 0.0, Kind.UNUSED))
    return result


def algorithm(model: Model) -> Any:
    """The `tokenizers` model."""
    if model.algorithm is Algorithm.UNIGRAM:
        return models.Unigram(
            [(piece.text, piece.score) for piece in model.pieces],
            unk_id=model.unk_id,
            byte_fallback=model.byte_fallback,
        )
    return models.BPE(
        vocab={piece.text: id for id, piece in enumerate(model.pieces)},
        merges=merges(model.pieces),
        unk_token=model.pieces[model.unk_id].text,
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
        ignore_merges=has_user_defined(model.pieces),  # they are whole, and not made of merges
    )


def has_user_defined(pieces: list[Piece]) -> bool:
    """Whether some pieces are found in a text before all others."""
    return any(piece.kind is Kind.USER_DEFINED for piece in pieces)


def merges(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Every pair of normal pieces that makes one, the piece of the highest score first.

    A piece may come of several pairs; they meet in one place only in runs of equal characters,
    which are merged from the left: the longer left part first.
    """
    normal = {piece.text: piece.score for piece in pieces if piece.kind is Kind.NORMAL}
    found = []
    for text in sorted(normal, key=normal.__getitem__, reverse=True):  # stable: then by id
        for cut in range(len(text) - 1, 0, -1):
            left, right = text[:cut], text[cut:]
            if left in normal and right in normal:
                found.append((left, right))
    return found


def normalizing(model: Model) -> list[Any]:
    """What is done to a text before it is cut; only spaces count as extra."""
    steps: list[Any] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.removes_extra_spaces:
        steps.append(normalizers.Replace(Regex(rf"\A +|[ {MARK}]+\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    return [*steps, normalizers.Replace(" ", MARK)]


def prefixing(model: Model, *, every_part: bool) -> list[Any]:
    """The ▁ in front, before the first part of a text or every part between special tokens.

    The library's step leaves it out where one is there already, sentencepiece does not: so a space
    is put in front, of which there are none left, and becomes ▁ in a second step.
    """
    if not model.dummy_prefix:
        return []
    scheme = "always" if every_part else "first"
    return [
        pre_tokenizers.Metaspace(" ", prepend_scheme=scheme, split=False),
        pre_tokenizers.Metaspace(MARK, prepend_scheme="never", split=False),
    ]


def splitting(model: Model, pieces: list[Piece]) -> list[Any]:
    """Cuts around user-defined pieces, which are found first, the longest at each place."""
    user = [re.escape(p.text) for p in pieces if p.kind is Kind.USER_DEFINED]
    patterns = sorted(user, key=len, reverse=True)
    whole_pieces = bool(patterns) or model.algorithm is Algorithm.UNIGRAM
    if model.byte_fallback and whole_pieces:
        patterns.append(BYTE_AS_TEXT)
    if not patterns:
        return []
    return [pre_tokenizers.Split(Regex("|".join(patterns)), "isolated")]


def decoding(model: Model) -> list[Any]:
    """Tokens to text."""
    steps: list[Any] = [decoders.Replace(MARK, " ")]
    if model.byte_fallback:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    if model.removes_extra_spaces:
        steps.append(decoders.Strip(" ", ALL, 0))
    elif model.dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return steps
