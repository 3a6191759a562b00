"""The tokenizer of a checkpoint: text to token ids and back, exactly as transformers does it.

Built on the `tokenizers` library from the files of a model directory, in any of the formats of
`formats/`, and from the settings beside them (`files.py`). The room knows nothing of models,
requests or streams.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from pagedserve.errors import RequestError, StartupError
from pagedserve.text.files import added_tokens, more_specials, named_specials
from pagedserve.text.formats import load_backend
from pagedserve.text.formats.vocabulary import add_specials
from pagedserve.text.pieces import PieceTable

# What `clean_up_tokenization_spaces` means, in transformers' order.
CLEANED = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


class Tokenizer:
    """Text ↔ token ids. Thread-safe: nothing changes after construction but caches.

    `special_tokens` maps "bos_token", "eos_token", … to their text, for chat templates.
    `cleans_up` is true where the checkpoint asks that " ." be written "." and so on; like
    transformers it is never true for BPE, where it would destroy text.
    """

    def __init__(self, backend: Backend, config: Mapping[str, Any] | None = None):
        self.backend = backend
        self.config = dict(config or {})
        self.special_tokens = named_specials(self.config)
        specials = [*self.special_tokens.values(), *more_specials(self.config)]
        add_missing_tokens(backend, self.config, specials)
        backend.no_truncation()
        backend.no_padding()
        self.special_ids = frozenset(
            id for id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.cleans_up = (
            bool(self.config.get("clean_up_tokenization_spaces", False))
            and type(backend.model).__name__ != "BPE"
        )
        self.pieces = PieceTable(backend)
        # In characters; it bounds from below how many tokens a text can be.
        self.longest_token: int = max(map(len, backend.get_vocab()), default=1)

    @classmethod
    def from_directory(
        cls,
        path: str | Path,
        class_defaults: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Tokenizer:
        """Load the tokenizer of a checkpoint. Raises StartupError saying what is missing.

        `class_defaults`: what the code of checkpoints knows and their files do not say, by
        `tokenizer_class` (see `formats`).
        """
        directory = Path(path)
        backend, config = load_backend(directory, class_defaults or {})
        try:
            return cls(backend, config)
        except (TypeError, ValueError, AttributeError) as error:
            raise StartupError(
                f"{directory / 'tokenizer_config.json'} holds a value of the wrong type: {error}"
            ) from error

    @property
    def end_id(self) -> int | None:
        """The token that ends a text; None where the settings name none."""
        end = self.special_tokens.get("eos_token")
        id: int | None = None if end is None else self.backend.token_to_id(end)
        return id

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; with `add_special_tokens` also what the model expects around it.

        Lets other threads run meanwhile. Raises RequestError for half of a surrogate pair, which a
        str may hold and no text does.
        """
        try:
            # The library's `encode` keeps the interpreter's lock, `encode_batch` gives it up.
            (encoded,) = self.backend.encode_batch([text], add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeEncodeError) as error:  # all that the library says
            raise RequestError(
                f"the text cannot be encoded as UTF-8: {half_pair(text)}", param="prompt"
            ) from error
        ids: list[int] = encoded.ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`, equal to transformers' `decode`. Ids outside the vocabulary drop out."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return clean_up(text) if self.cleans_up else text

    def token_bytes(self, id: int) -> bytes:
        """The bytes that one token writes; they need not be whole characters."""
        return self.pieces.bytes_of(id)

    def token_string(self, id: int) -> str:
        """One token to show: its text, or OpenAI's `bytes:\\xe2\\x80` where it is no whole text."""
        written = self.pieces.bytes_of(id)
        try:
            return written.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in written)


def half_pair(text: str) -> str:
    """Where `text` holds a surrogate without its other half."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"{error.reason} at character {error.start}"
    raise AssertionError(f"a tokenizer refused a text of {len(text)} characters")


def clean_up(text: str) -> str:
    """`text` without the spaces that word-piece tokenizers put before punctuation."""
    for found, written in CLEANED:
        text = text.replace(found, written)
    return text


def add_missing_tokens(
    backend: Backend, config: Mapping[str, Any], specials: Iterable[str]
) -> None:
    """Add the tokens that only the settings know of, as transformers does."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for _, token in added_tokens(config):
        if token.content not in known:
            backend.add_tokens([token])
            known.add(token.content)
    add_specials(backend, [text for text in specials if text not in known])
