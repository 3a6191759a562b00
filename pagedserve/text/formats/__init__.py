"""The formats that tokenizers come in, each made a `tokenizers.Tokenizer`.

    tokenizer.json              the library's own file: read as it is
    tokenizer.model             sentencepiece_model.py, or ranks.py by its content
    *.tiktoken, tiktoken.model  ranks.py
    tekken.json                 tekken.py
    vocab.json, merges.txt      byte_level.py

Some checkpoints leave to their code what no file says: whether a text begins with a token, how it
is split, which special tokens follow the vocabulary. Such knowledge comes in as `class_defaults`:
settings by `tokenizer_class`, which the checkpoint's own settings override. Besides the keys of
tokenizer_config.json they may have

    specials          named special tokens, where the vocabulary has them
    split_pattern     regular expression of the pieces that are encoded one by one
    normal_form       Unicode normal form that a text is brought into first
    tail_tokens       special tokens whose ids follow the vocabulary, in their order
    tail_names        how many more follow, and their name where no file gives one, with {id} for
                      the id and {at} for the place
    prefix_tokens     tokens before every text

The room knows no model; whose knowledge that is, is said where the table is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from pagedserve.errors import StartupError
from pagedserve.text.files import read_config
from pagedserve.text.formats import byte_level, ranks, sentencepiece_model, tekken
from pagedserve.text.formats.vocabulary import with_class_specials

MODEL_FILES = ("tokenizer.model", "spiece.model")
Config = dict[str, Any]


def load_backend(
    directory: Path, class_defaults: Mapping[str, Mapping[str, Any]]
) -> tuple[Backend, Config]:
    """The tokenizer of a checkpoint in whatever format it has, and its settings.

    Raises StartupError that names the file that cannot be used, or the formats that are known.
    """
    config = settings(directory, class_defaults)
    file = directory / "tokenizer.json"
    if file.is_file():
        backend = read_own(file)
        known = backend.get_vocab() if config.get("specials") else {}
        return backend, with_class_specials(config, known)
    try:
        return build(directory, config)
    except (TypeError, ValueError, AttributeError) as error:
        raise StartupError(
            f"the tokenizer settings in {directory} hold a value of the wrong type: {error}"
        ) from error


def settings(directory: Path, class_defaults: Mapping[str, Mapping[str, Any]]) -> Config:
    """The checkpoint's settings over those of its tokenizer class."""
    try:
        config = read_config(directory)
    except (TypeError, ValueError, AttributeError) as error:
        raise StartupError(
            f"the tokenizer settings in {directory} hold a value of the wrong type: {error}"
        ) from error
    name = config.get("tokenizer_class")
    known = class_defaults.get(name.removesuffix("Fast"), {}) if isinstance(name, str) else {}
    return {**known, **config}


def read_own(file: Path) -> Backend:
    """The library's own file."""
    try:
        return Backend.from_file(str(file))
    except (KeyboardInterrupt, SystemExit):
        raise
    except (
        BaseException
    ) as error:  # the library raises bare Exception, and its panics not even that
        raise StartupError(f"{file} cannot be read: {error}") from error


def build(directory: Path, config: Config) -> tuple[Backend, Config]:
    """A tokenizer of the first known format whose files are there, with its settings."""
    for name in MODEL_FILES:
        file = directory / name
        if file.is_file():
            if ranks.is_rank_file(file):
                return ranks.load(file, config)
            return sentencepiece_model.load(file, config)
    for file in sorted(directory.glob("*.tiktoken")) + [directory / "tiktoken.model"]:
        if file.is_file():
            return ranks.load(file, config)
    if (directory / tekken.FILE).is_file():
        return tekken.load(directory / tekken.FILE, config)
    if (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
        return byte_level.load(directory, config)
    raise StartupError(
        f"there is no tokenizer in {directory}: no tokenizer.json, no tokenizer.model, "
        "no *.tiktoken, no tekken.json, no vocab.json with merges.txt; give another directory or "
        "hub id with --tokenizer"
    )
