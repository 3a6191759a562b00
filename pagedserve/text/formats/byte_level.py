"""GPT-2's format: `vocab.json` (token → id) and `merges.txt` (pairs, the first learned first).

Each character of a token stands for one byte, so every text can be written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from pagedserve.errors import StartupError
from pagedserve.text.files import flag, named_specials
from pagedserve.text.formats.vocabulary import (
    Vocabulary,
    place_added,
    surround,
    with_class_specials,
)
from pagedserve.text.pieces import byte_alphabet

NORMAL_FORMS = {"NFC": normalizers.NFC, "NFKC": normalizers.NFKC}


def load(directory: Path, config: dict[str, Any]) -> tuple[Backend, dict[str, Any]]:
    """The tokenizer in `directory`, and its settings. Raises StartupError."""
    vocabulary, merges = read(directory / "vocab.json", directory / "merges.txt")
    return build(directory / "vocab.json", vocabulary, merges, config)


def read(vocab: Path, merges: Path) -> tuple[Vocabulary, list[tuple[str, str]]]:
    """Both files. Raises StartupError naming them."""
    try:
        found: tuple[Vocabulary, list[tuple[str, str]]] = models.BPE.read_file(
            str(vocab), str(merges)
        )
    except Exception as error:  # the library raises bare Exception
        raise StartupError(f"{vocab} with {merges.name} cannot be read: {error}") from error
    return found


def build(
    file: Path,
    vocabulary: Vocabulary,
    merges: list[tuple[str, str]],
    config: dict[str, Any],
    *,
    whole_pieces: bool = False,
    add_bos: bool = False,
) -> tuple[Backend, dict[str, Any]]:
    """A byte-level tokenizer, and its settings.

    `whole_pieces`: a piece that is a token needs no merges, and every byte is one. `add_bos`: see
    `surround`. Raises StartupError, naming `file`, where bytes or the parts of merges have no
    token.
    """
    place_added(vocabulary, config)
    config = with_class_specials(config, vocabulary)
    unknown = None if whole_pieces else named_specials(config).get("unk_token")
    missing = [byte for char, byte in byte_alphabet().items() if char not in vocabulary]
    if missing and unknown is None:
        raise StartupError(
            f"{file} has no token for {len(missing)} of the 256 bytes, such as {missing[0]}, and "
            "no unk_token to stand for them"
        )
    try:
        model = models.BPE(
            vocab=vocabulary,
            merges=merges,
            unk_token=unknown if missing else None,
            ignore_merges=whole_pieces,
        )
    except Exception as error:  # the library raises bare Exception
        raise StartupError(f"{file}: its merges do not fit its vocabulary: {error}") from error
    backend = Backend(model)
    form = config.get("normal_form")
    if form is not None:
        backend.normalizer = NORMAL_FORMS[form]()
    backend.pre_tokenizer = splitter(
        config.get("split_pattern"), add_prefix_space=flag(config, "add_prefix_space", False)
    )
    backend.decoder = decoders.ByteLevel()
    surround(backend, config, add_bos=add_bos)
    return backend, config


def splitter(pattern: str | None, *, add_prefix_space: bool) -> Any:
    """What cuts a text into pieces and spells their bytes; GPT-2's way without a `pattern`."""
    spelling = pre_tokenizers.ByteLevel(
        add_prefix_space=add_prefix_space, use_regex=pattern is None
    )
    if pattern is None:
        return spelling
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), spelling])
