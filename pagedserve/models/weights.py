"""Where weights come from: a safetensors checkpoint, read tensor by tensor, or random numbers.

A checkpoint is accounted for to the last tensor: what the model needs and the files lack, and what
the files hold and the model does not use, ends the start with the names.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pagedserve.errors import StartupError
from pagedserve.models.config_json import read_json
from pagedserve.spec import DecoderSpec

DUMMY_RANGE = 1e-3  # small enough that deep random models stay finite in 16 bits
NAMES_SHOWN = 8


class Source(Protocol):
    """Gives tensors by their checkpoint names."""

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds such a tensor and does not ignore it, read or not."""
        ...

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape as stored; None where `has` says no."""
        ...

    def read(
        self, name: str, into: Tensor, *, transposed: bool = False, rows: Tensor | None = None
    ) -> None:
        """Fill `into`, casting and moving; as often and in as many parts as there are readers.

        `transposed`: the last two dimensions are stored the other way round. `rows`: int64 indices
        into the first dimension, after that turn; `stored[rows]` has the shape of `into`.
        """
        ...

    def finish(self) -> None:
        """Raise StartupError unless what was asked for and what was there are the same."""
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
        self, name: str, into: Tensor, *, transposed: bool = False, rows: Tensor | None = None
    ) -> None:
        into.uniform_(-DUMMY_RANGE, DUMMY_RANGE, generator=self.generator)

    def finish(self) -> None:
        return None


class Checkpoint:
    """The safetensors files of a directory, mapped, never read as a whole.

    `on_progress` hears of every tenth that is read. Raises StartupError for a directory without
    safetensors, for a shard that is not there, and for a file that is cut off or damaged.
    """

    def __init__(self, directory: Path, spec: DecoderSpec, on_progress: Callable[[str], None]):
        self.directory = directory
        self.on_progress = on_progress
        paths = weight_files(directory)
        self.files: dict[str, Any] = {}  # tensor name → open file
        self.paths: dict[str, Path] = {}
        for path in paths:
            opened = open_file(path)
            for name in opened.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                self.files[name], self.paths[name] = opened, path
        self.stored = stored_names(list(self.files), spec.prefix)
        ignored = ignored_patterns(spec)
        self.used = {n for n in self.stored if not any(re.search(p, n) for p in ignored)}
        self.unread = set(self.used)
        self.missing: list[str] = []
        self.num_tensors = len(self.unread)
        self.tenths = 0

    def has(self, name: str) -> bool:
        return name in self.used

    def shape(self, name: str) -> tuple[int, ...] | None:
        if name not in self.used:
            return None
        return tuple(self.files[self.stored[name]].get_slice(self.stored[name]).get_shape())

    def read(
        self, name: str, into: Tensor, *, transposed: bool = False, rows: Tensor | None = None
    ) -> None:
        if name not in self.stored:
            self.missing.append(name)
            return
        tensor = self.tensor(self.stored[name])
        if transposed:
            tensor = tensor.transpose(-2, -1)
        if rows is not None:
            tensor = tensor[rows]
        if tensor.shape != into.shape:
            raise StartupError(
                f"{name} in {self.directory} has shape {tuple(tensor.shape)}, but config.json asks "
                f"for {tuple(into.shape)}"
            )
        if not tensor.is_floating_point():
            raise StartupError(f"{name} in {self.directory} is {tensor.dtype}: not supported")
        into.copy_(tensor)
        self.unread.discard(name)
        self.report()

    def finish(self) -> None:
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

    def tensor(self, stored: str) -> Tensor:
        """A tensor as it lies in its file."""
        try:
            tensor: Tensor = self.files[stored].get_tensor(stored)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise StartupError(f"cannot read {stored} of {self.paths[stored]}: {error}") from error
        return tensor

    def report(self) -> None:
        """Tell of every full tenth once."""
        tenths = 10 * (self.num_tensors - len(self.unread)) // self.num_tensors
        if tenths > self.tenths:
            self.tenths = tenths
            self.on_progress(f"loading weights: {10 * tenths} %")


def ignored_patterns(spec: DecoderSpec) -> tuple[str, ...]:
    """Regular expressions of tensors that may be there and are not used."""
    found: tuple[str, ...] = getattr(spec, "ignored", ()) or getattr(spec, "buffers", ())
    return found


def weight_files(directory: Path) -> list[Path]:
    """One file, or the shards of an index. Raises StartupError where neither is there."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(read_json(index).get("weight_map", {}).values()))
        absent = [name for name in shards if not (directory / name).is_file()]
        if absent or not shards:
            raise StartupError(f"{directory} lacks shards of {index.name}: {listing(absent)}")
        return [directory / name for name in shards]
    if single.is_file():
        return [single]
    if any(directory.glob("*.bin")) or any(directory.glob("*.pth")):
        raise StartupError(
            f"{directory} has its weights as PyTorch .bin files only. They are pickles, which run "
            "code when they are opened, so they are not read; convert them to safetensors "
            "(transformers: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...))"
        )
    raise StartupError(
        f"{directory} has no weights: neither {single.name} nor {index.name} (random ones of the "
        "right shapes: --load-format dummy)"
    )


def open_file(path: Path) -> Any:
    """Map a safetensors file. Its header is checked against its length."""
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size if path.exists() else 0
        raise StartupError(
            f"{path} is cut off or damaged ({size} bytes): {error}; download it again"
        ) from error


def stored_names(names: list[str], prefix: str) -> dict[str, str]:
    """Full name → name in the file. A checkpoint saved without its head leaves the prefix out."""
    if any(name.startswith(prefix) for name in names):
        return {name: name for name in names}
    return {name if name.startswith("lm_head.") else prefix + name: name for name in names}


def listing(names: list[str]) -> str:
    """The first few names, and how many more."""
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
