"""What a sentencepiece model file says, read from its protobuf without the library.

Only a handful of fields of one message are needed, and reading them is shorter than a dependency
in C++ is heavy. Source: sentencepiece_model.proto, whose field numbers stand below; the wire format
is protobuf's (https://protobuf.dev/programming-guides/encoding).
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pagedserve.errors import StartupError

Field = tuple[int, int | bytes]  # number, value: a varint or fixed number as int, else bytes


class Kind(enum.IntEnum):
    """What a piece is."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Algorithm(enum.IntEnum):
    """How texts are cut into pieces."""

    UNIGRAM = 1
    BPE = 2
    WORD = 3
    CHAR = 4


@dataclass(frozen=True, slots=True)
class Piece:
    """An entry of the vocabulary; its place is its id."""

    text: str
    score: float = 0.0
    kind: Kind = Kind.NORMAL


@dataclass(slots=True)
class Model:
    """A model file. Defaults are the proto's."""

    pieces: list[Piece] = field(default_factory=list)
    algorithm: Algorithm = Algorithm.UNIGRAM
    byte_fallback: bool = False
    whitespace_suffix: bool = False
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = -1
    charsmap: bytes = b""
    dummy_prefix: bool = True
    removes_extra_spaces: bool = True
    escapes_spaces: bool = True
    denormalizes: bool = False


def read(file: Path) -> Model:
    """The model in `file`. Raises StartupError where it is none."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise StartupError(f"{file} cannot be read: {error.strerror}") from error
    try:
        model = parsed(content)
    except (ValueError, IndexError, TypeError, AttributeError, struct.error) as error:
        raise StartupError(f"{file} is no sentencepiece model: {error}") from error
    if not model.pieces:
        raise StartupError(f"{file} is no sentencepiece model: it has no pieces")
    return model


def parsed(content: bytes) -> Model:
    """ModelProto: 1 pieces, 2 trainer_spec, 3 normalizer_spec, 5 denormalizer_spec."""
    model = Model()
    for number, value in fields(content):
        if number == 1:
            model.pieces.append(piece(message(value)))
        elif number == 2:
            read_trainer(model, message(value))
        elif number == 3:
            read_normalizer(model, message(value))
        elif number == 5:
            model.denormalizes = any(n == 2 and v for n, v in fields(message(value)))
    return model


def piece(content: bytes) -> Piece:
    """SentencePiece: 1 piece, 2 score, 3 type."""
    text, score, kind = "", 0.0, Kind.NORMAL
    for number, value in fields(content):
        if number == 1:
            text = message(value).decode()
        elif number == 2:
            (score,) = struct.unpack("<f", struct.pack("<I", value))
        elif number == 3:
            kind = Kind(integer(value))
    return Piece(text, score, kind)


def read_trainer(model: Model, content: bytes) -> None:
    """TrainerSpec: 3 model_type, 24 treat_whitespace_as_suffix, 35 byte_fallback, 40 to 43 ids."""
    for number, value in fields(content):
        match number:
            case 3:
                model.algorithm = Algorithm(integer(value))
            case 24:
                model.whitespace_suffix = bool(value)
            case 35:
                model.byte_fallback = bool(value)
            case 40:
                model.unk_id = signed(value)
            case 41:
                model.bos_id = signed(value)
            case 42:
                model.eos_id = signed(value)
            case 43:
                model.pad_id = signed(value)


def read_normalizer(model: Model, content: bytes) -> None:
    """NormalizerSpec: 2 precompiled_charsmap, 3 to 5 what is done to spaces."""
    for number, value in fields(content):
        match number:
            case 2:
                model.charsmap = message(value)
            case 3:
                model.dummy_prefix = bool(value)
            case 4:
                model.removes_extra_spaces = bool(value)
            case 5:
                model.escapes_spaces = bool(value)


def fields(content: bytes) -> Iterator[Field]:
    """The fields of a message. Raises ValueError or IndexError where it is cut or none."""
    at, end = 0, len(content)
    while at < end:
        key, at = varint(content, at)
        wire = key & 7
        if wire == 0:
            value, at = varint(content, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = varint(content, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if at + size > end:
            raise ValueError(f"it ends before byte {at + size}")
        raw = content[at : at + size]
        at += size
        yield key >> 3, raw if wire == 2 else int.from_bytes(raw, "little")


def varint(content: bytes, at: int) -> tuple[int, int]:
    """The number at `at` in seven bits a byte, and where it ends."""
    value = shift = 0
    while True:
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError(f"a number without end at byte {at}")


def message(value: int | bytes) -> bytes:
    """The bytes of a field that has some."""
    if isinstance(value, bytes):
        return value
    raise ValueError("a number where there should be text")


def integer(value: int | bytes) -> int:
    """The number of a field that is one."""
    if isinstance(value, int):
        return value
    raise ValueError("text where there should be a number")


def signed(value: int | bytes) -> int:
    """A number that may be negative: -1 is written as 64 bits of ones."""
    number = integer(value)
    return number - (1 << 64) if number >> 63 else number
