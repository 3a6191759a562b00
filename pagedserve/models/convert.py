"""From pickles (`.bin`, `.pt`, `.pth`) to safetensors, file by file; the originals stay.

    pytorch_model-00001-of-00002.bin ─▶ model-00001-of-00002.safetensors ┐
    pytorch_model-00002-of-00002.bin ─▶ model-00002-of-00002.safetensors ┴ and their index

A pickle is opened by torch with `weights_only`: a list of harmless constructors and nothing else.
What asks for more is refused. New files appear under their names only once all of them are whole.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pagedserve.errors import StartupError
from pagedserve.models.hub.filenames import (
    INDEX,
    PICKLE_INDEX,
    PICKLES,
    SINGLE,
    is_small,
    lacking,
    listing,
    pickled,
    weight_map,
)
from pagedserve.models.shards import read_header

FORBIDDEN = re.compile(r"(?:GLOBAL|global:?|class) ([\w.]+)")
PART = ".part"


def convert(
    directory: Path, out: Path | None = None, say: Callable[[str], None] = lambda line: None
) -> list[Path]:
    """Write the pickled weights of `directory` as safetensors into `out` (left out: beside them).

    Tensors that share memory are each written whole. Another `out` also gets the config and the
    tokenizer. `say` hears of every file. Returns the files written. Raises StartupError where there
    is nothing to convert, where something would be overwritten, and for a pickle that is damaged or
    holds more than tensors; then nothing new is there.
    """
    sources = pickles(directory)
    target = out or directory
    check_target(sources, target)
    target.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    shard_of: dict[str, str] = {}
    try:
        for number, source in enumerate(sources, 1):
            name = SINGLE if len(sources) == 1 else shard_name(number, len(sources))
            part = target / (name + PART)
            written.append(part)
            for tensor in convert_file(source, part):
                if tensor in shard_of:
                    raise StartupError(f"{tensor} is both in {source} and in an earlier file")
                shard_of[tensor] = name
            say(f"{source.name} -> {target / name} ({part.stat().st_size / 1e6:,.1f} MB)")
        if len(sources) > 1:
            written.append(write_index(target / (INDEX + PART), shard_of, written))
        done = [part.rename(part.with_suffix("")) for part in written]
    except OSError as error:
        raise StartupError(f"cannot write to {target}: {error.strerror or error}") from error
    finally:
        for part in written:
            part.unlink(missing_ok=True)
    if target.resolve() != directory.resolve():
        done += copy_rest(directory, target)
    return done


def pickles(directory: Path) -> list[Path]:
    """The pickled weight files of a directory, in order. Raises StartupError where there are none.

    An index decides; else `pytorch_model.bin`; else every file that could hold weights.
    """
    if not directory.is_dir():
        raise StartupError(f"there is no directory {directory}")
    index = directory / PICKLE_INDEX
    if index.is_file():
        if absent := lacking(index):
            raise StartupError(f"{directory} lacks files of {index.name}: {listing(absent)}")
        return [directory / name for name in sorted(set(weight_map(index).values()))]
    found = pickled(path.name for path in directory.iterdir())
    if not found:
        raise StartupError(f"{directory} has no {', '.join(PICKLES)} file to convert")
    return [directory / name for name in found]


def check_target(sources: list[Path], target: Path) -> None:
    """Raise StartupError where weights are there already, or where the new ones do not fit."""
    there = sorted(path.name for path in target.glob("*.safetensors*") if path.suffix != PART)
    if there:
        raise StartupError(
            f"{target} has safetensors already ({listing(there)}); nothing was converted. Serve "
            "it as it is, or give another directory with --out"
        )
    needed = sum(source.stat().st_size for source in sources)
    existing = next(path for path in (target, *target.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise StartupError(
            f"{target} has {free / 1e9:.1f} GB free, and the safetensors need about "
            f"{needed / 1e9:.1f} GB; give a directory elsewhere with --out"
        )


def shard_name(number: int, count: int) -> str:
    """The usual name of one of several weight files, counted from one."""
    return f"model-{number:05}-of-{count:05}.safetensors"


def convert_file(source: Path, part: Path) -> list[str]:
    """Write the tensors of one pickle to `part`; their names. Raises StartupError."""
    tensors = dict(plain(source, state_dict(source)))
    try:
        save_file(tensors, part, metadata={"format": "pt"})
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        if "os error" in str(error):  # how the library tells of a full disk
            raise StartupError(f"cannot write {part}: {error}") from error
        raise StartupError(f"{source} cannot be written as safetensors: {error}") from error
    found = read_header(part)
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert {name: stored.shape for name, stored in found.items()} == wanted, (
        "safetensors wrote less"
    )
    return list(found)


def state_dict(source: Path) -> Mapping[str, Any]:
    """The tensors of a pickle, mapped where the file allows it. Raises StartupError."""
    with source.open("rb") as file:
        zipped = file.read(2) == b"PK"
    if zipped and not zipfile.is_zipfile(source):
        raise StartupError(f"{source} is cut off ({source.stat().st_size} bytes); get it again")
    try:
        found = torch.load(source, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise StartupError(refusal(source, str(error))) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, IndexError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise StartupError(f"{source} is damaged ({reason}); get it again") from error
    for _ in range(2):  # {"state_dict": {...}} and the like
        inner = [value for value in values(found) if isinstance(value, Mapping)]
        if len(inner) != 1 or any(isinstance(value, Tensor) for value in values(found)):
            break
        found = inner[0]
    if not isinstance(found, Mapping) or not found:
        raise StartupError(f"{source} holds {kind(found)}, not tensors by their names")
    return found


def plain(source: Path, found: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor, each contiguous and in memory of its own. Raises StartupError."""
    storages: set[int] = set()
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise StartupError(
                f"{source} holds {name} = {kind(value)}; only files of nothing but tensors can be "
                "converted"
            )
        if value.layout != torch.strided or value.is_quantized or value.is_complex():
            raise StartupError(f"{source}: {name} is {kind(value)}, which is not supported")
        tensor = value.detach()
        storage = tensor.untyped_storage()
        whole = tensor.is_contiguous() and storage.nbytes() == tensor.nbytes
        if not whole or storage.data_ptr() in storages:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        storages.add(storage.data_ptr())
        yield str(name), tensor


def refusal(source: Path, said: str) -> str:
    """Why torch's weights-only loader did not open `source`."""
    if match := FORBIDDEN.search(said):
        return (
            f"{source} asks to run {match[1]} when it is opened, as no file of weights has to; it "
            "was not opened. Get the model as safetensors from who made it"
        )
    return f"{source} is damaged or no file of weights: {first_line(said)}; get it again"


def first_line(error: object) -> str:
    """The first line of a message that may be pages long."""
    return (str(error).strip().splitlines() or ["empty"])[0][:300]


def kind(value: object) -> str:
    """A value's type for people."""
    if isinstance(value, Tensor):
        form = "quantised" if value.is_quantized else str(value.layout).removeprefix("torch.")
        return f"a tensor of {form} {value.dtype}"
    return f"a {type(value).__name__}"


def values(found: object) -> list[Any]:
    """The values of a mapping, nothing of anything else."""
    return list(found.values()) if isinstance(found, Mapping) else []


def write_index(path: Path, shard_of: dict[str, str], parts: list[Path]) -> Path:
    """Write the index of several files; its path."""
    total = sum(stored.num_bytes for part in parts for stored in read_header(part).values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(shard_of.items()))}
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return path


def copy_rest(directory: Path, target: Path) -> list[Path]:
    """Copy what a model needs beside its weights, and `target` has not; the copies."""
    rest = sorted(path for path in directory.iterdir() if is_small(path.name))
    return [
        Path(shutil.copy(path, target / path.name))
        for path in rest
        if not (target / path.name).exists()
    ]
