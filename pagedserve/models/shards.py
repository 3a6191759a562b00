"""safetensors files: which of a directory hold its weights, what their headers say, their bytes.

    8 bytes    length of the header, little endian
    header     JSON: name → {"dtype", "shape", "data_offsets": [begin, end]}, and "__metadata__"
    data       the tensors, without a gap

(https://github.com/safetensors/safetensors#format.) Files are read into given memory and never
mapped: a file that shrinks while it is read is an error, not a SIGBUS, and no page of a file counts
as memory of this process. Which tensor becomes what is not known here.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import struct
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pagedserve.errors import StartupError
from pagedserve.models.hub.filenames import INDEX, SINGLE, lacking, listing, pickled, weight_map

LENGTH = struct.Struct("<Q")
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
# What a header that is none makes Python raise; the last where it nests too deep.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
READ_BYTES = 1 << 30  # Linux reads at most 2 GiB at a time

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
DTYPES = {
    **FLOATS,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class State:
    """What a file is known again by: another one in its place, or other bytes, have another."""

    device: int
    inode: int
    size: int
    changed_ns: int

    @classmethod
    def of(cls, fd: int) -> State:
        """Of an open file."""
        found = os.fstat(fd)
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as its file holds it. `dtype`: the format's name; `start`: its first byte there.

    `state`: the file's, when its header was read.
    """

    path: Path
    state: State
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


def stored_tensors(directory: Path) -> dict[str, Stored]:
    """Every tensor of the weights in `directory`, by name.

    Raises StartupError where there are no safetensors, where the index does not fit the shards, and
    for a file that is not there, cut off or damaged.
    """
    index = directory / INDEX
    if not index.is_file():
        return read_header(single_file(directory))
    shard_of = weight_map(index)
    if absent := lacking(index):
        raise StartupError(f"{directory} lacks shards of {index.name}: {listing(absent)}")
    found: dict[str, Stored] = {}
    twice: list[tuple[str, Path, Path]] = []
    for shard in sorted(set(shard_of.values())):
        for name, stored in read_header(directory / shard).items():
            if shard_of.get(name, shard) != shard:  # a copy in a shard the index does not name
                continue
            if name in found:
                twice.append((name, found[name].path, stored.path))
            found[name] = stored
    unfound = sorted(shard_of.keys() - found.keys())
    if unfound:
        raise StartupError(
            f"{index} names {len(unfound)} tensors that their files lack: "
            f"{listing([f'{name} of {shard_of[name]}' for name in unfound])}"
        )
    for name, one, other in twice:
        raise StartupError(
            f"{one} and {other} both hold {name}, and {index.name} does not say which counts"
        )
    return found


def single_file(directory: Path) -> Path:
    """The only weight file. Raises StartupError, with what to do, where there is none."""
    single = directory / SINGLE
    if single.is_file():
        return single
    if pickles := pickled(path.name for path in directory.iterdir()):
        raise StartupError(
            f"{directory} has its weights as pickles only ({listing(pickles)}). They run code when "
            f"they are opened, so they are not read; write safetensors beside them with: "
            f"pagedserve convert {shlex.quote(str(directory))}"
        )
    if others := sorted(path.name for path in directory.glob("*.safetensors")):
        raise StartupError(
            f"{directory} has neither {SINGLE} nor {INDEX}, only {listing(others)}: one file must "
            f"have the first name, of several the second must say which holds what"
        )
    raise StartupError(
        f"{directory} has no weights: neither {SINGLE} nor {INDEX} (random ones of the right "
        "shapes: --load-format dummy)"
    )


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a file, in the order of their bytes.

    Raises StartupError naming the file unless header, shapes and length agree to the last byte.
    """
    try:
        with path.open("rb") as file:
            state = State.of(file.fileno())
            size = state.size
            (length,) = LENGTH.unpack(exactly(file.read(LENGTH.size), LENGTH.size))
            if length > min(MAX_HEADER_BYTES, size - LENGTH.size):
                raise ValueError(f"its header would be {length} bytes long")
            header = json.loads(exactly(file.read(length), length))
        return check_header(path, header, LENGTH.size + length, state)
    except UNREADABLE as error:
        size = path.stat().st_size if path.exists() else 0
        raise StartupError(
            f"{path} is cut off or damaged ({size} bytes): {said(error)}; get it again"
        ) from error


def check_header(path: Path, header: Any, begin: int, state: State) -> dict[str, Stored]:
    """The tensors of a parsed header whose data begin at byte `begin`. ValueError."""
    found = {}
    end = begin
    entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
    for name, entry in sorted(entries, key=lambda each: tuple(each[1]["data_offsets"])):
        first, last = (begin + offset for offset in entry["data_offsets"])
        shape, dtype = tuple(entry["shape"]), entry["dtype"]
        if not all(type(n) is int and n >= 0 for n in (*shape, *entry["data_offsets"])):
            raise ValueError(f"the shape or place of {name} is not made of counts")
        wanted = math.prod(shape) * DTYPES[dtype].itemsize if dtype in DTYPES else last - first
        if first != end or last - first != wanted:
            raise ValueError(f"{name} {shape} {dtype} does not lie where it should")
        found[name] = Stored(path, state, dtype, shape, first, last - first)
        end = last
    if end != state.size:
        raise ValueError(f"its header speaks of {end} bytes")
    return found


def exactly(data: bytes, count: int) -> bytes:
    """`data` if it is `count` bytes long. ValueError."""
    if len(data) != count:
        raise ValueError("it ends within its header")
    return data


def said(error: Exception) -> str:
    """What an exception says, with a word for those that only name a key."""
    return f"no {error} in its header" if isinstance(error, KeyError) else str(error)


class Files:
    """Files opened as they are needed, and read by position; several threads may."""

    def __init__(self) -> None:
        self._open: dict[Path, tuple[int, State]] = {}
        self._opening = threading.Lock()

    def read(self, stored: Stored, into: Tensor, *, skip: int = 0, later: bool = False) -> None:
        """Fill `into`, contiguous on the CPU, with bytes of `stored` from its byte `skip` on: at
        once, also where it might be later.

        Raises StartupError where the file cannot be read, ends before that, or is another one than
        when its header was read.
        """
        if into.numel() == 0:
            return
        wanted = memoryview(into.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        position, done = stored.start + skip, 0
        try:
            fd = self._descriptor(stored)
            while done < len(wanted):
                got = os.preadv(fd, [wanted[done : done + READ_BYTES]], position + done)
                if got == 0:
                    raise OSError(f"it ends at byte {position + done}")
                done += got
        except OSError as error:
            raise StartupError(f"cannot read {stored.path}: {error.strerror or error}") from error

    def settle(self) -> None:
        """Nothing was left for later."""

    def check(self) -> None:
        """Raise StartupError where a file that is open changed since its header was read."""
        for path, (fd, state) in self._open.items():
            if State.of(fd) != state:
                raise StartupError(f"{path} was changed while it was read; start again")

    def close(self) -> None:
        """Close what is open."""
        while self._open:
            os.close(self._open.popitem()[1][0])

    def __del__(self) -> None:
        self.close()

    def _descriptor(self, stored: Stored) -> int:
        with self._opening:
            if stored.path not in self._open:
                fd = os.open(stored.path, os.O_RDONLY)
                self._open[stored.path] = fd, stored.state
                if State.of(fd) != stored.state:
                    raise OSError("it is not the file any more whose header was read; start again")
            return self._open[stored.path][0]
