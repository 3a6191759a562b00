"""Which files of a model are which, in a directory or on the hub. No torch here."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterable
from pathlib import Path

from pagedserve.errors import StartupError
from pagedserve.models.config_json import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth")
# What training leaves beside the weights.
NO_WEIGHTS = re.compile(r"training_args|optimizer|scheduler|scaler|rng_state|random_states")
# Config, tokenizer and chat template; nothing in a subdirectory.
SMALL = ("*.json", "*.jinja", "*.model", "*.model.v*", "*.tiktoken", "merges.txt", "vocab.*")
TOKENIZER = ("tokenizer.json", "tekken.json", "*.model", "*.model.v*", "*.tiktoken", "vocab.*")
NOT_NEEDED = ("*.bin.index.json", "model.*.index.json", "trainer_state.json", "*_results.json")
NAMES_SHOWN = 8
MAX_NAME_BYTES = 255  # of every common file system


def is_small(name: str) -> bool:
    """Whether serving needs this file beside the weights."""
    return matches(name, SMALL) and (name == INDEX or not matches(name, NOT_NEEDED))


def pickled(names: Iterable[str]) -> list[str]:
    """The files that hold pickled weights, one of several forms of the same only."""
    every = sorted(n for n in names if matches(n, PICKLES) and not NO_WEIGHTS.search(n))
    return [PICKLE] if PICKLE in every else every


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether `name` is a file of the top directory that fits one of `patterns`."""
    return "/" not in name and any(fnmatch.fnmatchcase(name, p) for p in patterns)


def weight_map(index: Path) -> dict[str, str]:
    """Tensor name → file name, as an index says. Raises StartupError for what is no index."""
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise StartupError(f"{index} has no weight_map: it must name the file of every tensor")
    for name, shard in found.items():
        if not isinstance(shard, str) or not is_file_name(shard):
            raise StartupError(f"{index}: the file of {name} must be a name, got {shard!r}")
    return found


def is_file_name(name: str) -> bool:
    """Whether a file of a directory can have this name; asking for another raises all sorts."""
    try:
        encoded = os.fsencode(name)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return Path(name).name == name and b"\0" not in encoded and len(encoded) <= MAX_NAME_BYTES


def lacking(index: Path) -> list[str]:
    """The files that an index names and its directory has not. Raises StartupError."""
    return sorted(f for f in set(weight_map(index).values()) if not (index.parent / f).is_file())


def listing(names: list[str]) -> str:
    """The first few names, and how many more."""
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
