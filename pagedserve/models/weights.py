"""Where weights come from: a safetensors checkpoint, read tensor by tensor, or random numbers.

A checkpoint is accounted for to the last tensor: what the model needs and the files lack, and what
the files hold and the model does not use, ends the start with the names.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pagedserve.errors import StartupError
from pagedserve.models.hub.filenames import listing
from pagedserve.models.shards import DTYPES, FLOATS, Files, Stored, stored_tensors
from pagedserve.spec import DecoderSpec

log = logging.getLogger("pagedserve")

DUMMY_RANGE = 1e-3  # small enough that deep random models stay finite in 16 bits
# What is cast or turned passes through memory of this size, on the device where it stays: on a CPU
# small enough to be still in a core's cache, on a GPU large enough for its threads and the ring's.
STAGING_BYTES = 1 << 20
GPU_STAGING_BYTES = 64 << 20
# Tensors that old checkpoints hold and every implementation computes: not worth a word.
KNOWN_BUFFERS = re.compile(
    r"rotary_emb|inv_freq|causal_mask|(attn|attention)\.(masked_)?bias$", re.IGNORECASE
)


class Source(Protocol):
    """Gives tensors by their checkpoint names."""

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds such a tensor and does not ignore it, read or not."""
        ...

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape as stored; None where `has` says no."""
        ...

    def read(
        self,
        name: str,
        into: Tensor,
        *,
        transposed: bool = False,
        rows: Tensor | None = None,
        later: bool = False,
    ) -> None:
        """Fill `into`, casting and moving; as often and in as many parts as there are readers.

        `transposed`: the last two dimensions are stored the other way round. `rows`: int64 indices
        into the first dimension, after that turn; `stored[rows]` has the shape of `into`. An `into`
        that holds no floating point numbers is filled with what is stored in just its dtype.
        `later`: nobody looks at `into` before `settle` or `finish`, so that threads need not stop
        between one tensor and the next.
        """
        ...

    def settle(self) -> None:
        """Have everything read that was to be read `later`."""
        ...

    def finish(self) -> None:
        """Raise StartupError unless what was asked for and what was there are the same."""
        ...


class Reading(Protocol):
    """Brings bytes of files to where tensors stay: `shards.Files` on a CPU, else `ring.Ring`."""

    def read(self, stored: Stored, into: Tensor, *, skip: int = 0, later: bool = False) -> None:
        """Fill `into`, contiguous, with bytes of `stored` from its byte `skip` on.

        `later`: it need not be whole before `settle`.
        """
        ...

    def settle(self) -> None:
        """Make whole what was read `later`."""
        ...

    def check(self) -> None:
        """Raise StartupError where a file changed while it was read."""
        ...

    def close(self) -> None:
        """Let go of everything."""
        ...


class Dummy:
    """Seeded uniform numbers within ±1e-3, norms included, made on the device itself."""

    def __init__(self, seed: int, device: torch.device):
        self.generator = torch.Generator(device).manual_seed(seed)

    def has(self, name: str) -> bool:
        return False

    def shape(self, name: str) -> tuple[int, ...] | None:
        return None

    def read(
        self,
        name: str,
        into: Tensor,
        *,
        transposed: bool = False,
        rows: Tensor | None = None,
        later: bool = False,
    ) -> None:
        if into.is_floating_point():
            into.uniform_(-DUMMY_RANGE, DUMMY_RANGE, generator=self.generator)
        else:
            into.random_(0, 128, generator=self.generator)  # fits every integer dtype

    def settle(self) -> None:
        return None

    def finish(self) -> None:
        return None


class Shapes:
    """No numbers: for a model that is only measured."""

    def has(self, name: str) -> bool:
        return False

    def shape(self, name: str) -> tuple[int, ...] | None:
        return None

    def read(
        self,
        name: str,
        into: Tensor,
        *,
        transposed: bool = False,
        rows: Tensor | None = None,
        later: bool = False,
    ) -> None:
        assert into.is_meta, "a tensor with numbers would keep what was there before"

    def settle(self) -> None:
        return None

    def finish(self) -> None:
        return None


class Checkpoint:
    """The safetensors files of a directory, read as the model asks, never as a whole.

    `files` reads them, `shards.Files` if left out. `on_bytes` hears of every hundredth of the
    bytes, how many were read and of how many; without it `on_progress` hears of every tenth. Raises
    StartupError for everything that `shards.stored_tensors` finds wrong, before anything is read.
    """

    def __init__(
        self,
        directory: Path,
        spec: DecoderSpec,
        on_progress: Callable[[str], None],
        files: Reading | None = None,
        on_bytes: Callable[[int, int], None] | None = None,
    ):
        self.directory = directory
        self.on_progress = on_progress
        found = renamed(stored_tensors(directory), spec, directory)
        self.tensors = {n: found[name] for n, name in full_names(found, spec.prefix).items()}
        ignored = {n for n in self.tensors if any(re.search(p, n) for p in spec.ignored)}
        tell_ignored(directory, sorted(ignored))
        self.used = self.tensors.keys() - ignored
        self.unread = set(self.used)
        self.missing: list[str] = []
        self.num_bytes = sum(self.tensors[name].num_bytes for name in self.used)
        self.bytes_read = 0
        self.parts_read = 0
        self.on_bytes = on_bytes
        self.files = files or Files()
        self.staging = torch.empty(0, dtype=torch.uint8)

    def has(self, name: str) -> bool:
        return name in self.used

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self.tensors[name].shape if name in self.used else None

    def read(
        self,
        name: str,
        into: Tensor,
        *,
        transposed: bool = False,
        rows: Tensor | None = None,
        later: bool = False,
    ) -> None:
        stored = self.tensors.get(name)
        if stored is None:
            self.missing.append(name)
            return
        self.check_dtype(name, stored, into.dtype)
        self.check_shape(name, stored, into, transposed, rows)
        if into.numel():
            self.move(stored, into, transposed, rows, later)
        if name in self.unread:
            self.unread.discard(name)
            self.report(stored.num_bytes)

    def settle(self) -> None:
        self.files.settle()

    def finish(self) -> None:
        self.files.settle()
        self.files.check()
        self.files.close()
        self.staging = torch.empty(0, dtype=torch.uint8)
        if self.missing:
            raise StartupError(
                f"{self.directory} lacks {len(self.missing)} tensors that its config.json needs: "
                f"{listing(self.missing)}"
            )
        if self.unread:
            raise StartupError(
                f"{self.directory} holds {len(self.unread)} tensors that its architecture does not "
                f"use: {listing(sorted(self.unread))}"
            )

    def check_dtype(self, name: str, stored: Stored, wanted: torch.dtype) -> None:
        """Raise StartupError unless `stored` can be cast to `wanted`."""
        if DTYPES.get(stored.dtype) is wanted or (
            wanted.is_floating_point and stored.dtype in FLOATS
        ):
            return
        what = f"{name} in {stored.path} is {stored.dtype}"
        if stored.dtype.startswith("F8"):
            raise StartupError(
                f"{what}: fp8 numbers mean nothing without the scales of a quantisation scheme, "
                "and config.json names none; give a checkpoint in 16 or 32 bits, or its own config"
            )
        raise StartupError(f"{what}: not supported; weights must be {', '.join(FLOATS)}")

    def check_shape(
        self, name: str, stored: Stored, into: Tensor, transposed: bool, rows: Tensor | None
    ) -> None:
        """Raise StartupError unless what is taken from `stored` has the shape of `into`."""
        turned = stored.shape
        if transposed:
            turned = (*turned[:-2], *reversed(turned[-2:]))
        taken, last = turned, -1
        if rows is not None:
            taken, last = (len(rows), *turned[1:]), int(rows.max()) if len(rows) else -1
        if taken != tuple(into.shape) or (rows is not None and last >= (*turned, 0)[0]):
            part = "" if rows is None else f" in rows up to {last}"
            raise StartupError(
                f"{name} in {stored.path} has shape {turned}, but config.json asks for "
                f"{tuple(into.shape)}{part}"
            )

    def move(
        self, stored: Stored, into: Tensor, transposed: bool, rows: Tensor | None, later: bool
    ) -> None:
        """Bring the bytes of `stored` to `into`: straight where that is all, else in pieces.

        The one place where weights move.
        """
        begin, end = 0, (*stored.shape, 1)[0]
        by_row = not transposed or len(stored.shape) > 2  # `rows` select what lies together
        if rows is not None and by_row:
            begin, end = int(rows.min()), int(rows.max()) + 1
            if torch.equal(rows, torch.arange(begin, end)):
                rows = None
        dtype = DTYPES[stored.dtype]
        row_bytes = stored.num_bytes // (*stored.shape, 1)[0]
        plain = rows is None and not transposed and into.dtype is dtype
        if plain and into.is_contiguous():
            self.files.read(stored, into, skip=begin * row_bytes, later=later)
            return
        target = into.transpose(-2, -1) if transposed else into
        piece_bytes = STAGING_BYTES if into.device.type == "cpu" else GPU_STAGING_BYTES
        step = max(1, piece_bytes // row_bytes)
        for first in range(begin, end, step):
            last = min(first + step, end)
            piece = self.staged((last - first) * row_bytes, into.device)
            self.files.read(stored, piece, skip=first * row_bytes)
            part = piece.view(dtype).view(last - first, *stored.shape[1:])
            if rows is None:
                at = slice(first - begin, last - begin)
                target.view(target.shape or (1,))[at].copy_(part)
            elif by_row:
                (where,) = ((rows >= first) & (rows < last)).nonzero(as_tuple=True)
                picked = (rows[where] - first).to(into.device)
                target[where.to(into.device)] = part[picked].to(into.dtype)
            else:
                target[first:last].copy_(part[:, rows.to(into.device)])

    def staged(self, num_bytes: int, device: torch.device) -> Tensor:
        """So many bytes of the one staging buffer."""
        if self.staging.numel() < num_bytes or self.staging.device != device:
            self.staging = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        return self.staging[:num_bytes]

    def report(self, num_bytes: int) -> None:
        """Tell of every full part once."""
        self.bytes_read += num_bytes
        parts = 10 if self.on_bytes is None else 100
        read = parts * self.bytes_read // max(self.num_bytes, 1)
        if read == self.parts_read:
            return
        self.parts_read = read
        if self.on_bytes is None:
            self.on_progress(f"loading weights: {10 * read} %")
        else:
            self.on_bytes(self.bytes_read, self.num_bytes)


def renamed(found: dict[str, Stored], spec: DecoderSpec, directory: Path) -> dict[str, Stored]:
    """By the names that `DecoderSpec.renames` makes. Raises StartupError where two become one."""
    result: dict[str, Stored] = {}
    for name, stored in found.items():
        new = name
        for pattern, replacement in spec.renames:
            new = re.sub(pattern, replacement, new)
        if new in result:
            raise StartupError(f"{directory} holds {new} twice, once as {name}")
        result[new] = stored
    return result


def tell_ignored(directory: Path, names: list[str]) -> None:
    """One line of the log where more is left out than what can be computed anyway."""
    if not all(KNOWN_BUFFERS.search(name) for name in names):
        log.info("%s: %d tensors are not used: %s", directory, len(names), listing(names))


def full_names(names: Iterable[str], prefix: str) -> dict[str, str]:
    """Full name → name in the file. A checkpoint saved without its head leaves the prefix out."""
    names = list(names)
    if any(name.startswith(prefix) for name in names):
        return {name: name for name in names}
    return {name if name.startswith("lm_head.") else prefix + name: name for name in names}
