"""The tokenizer of a checkpoint: text to token ids and back, exactly as transformers does it.

Built on the `tokenizers` library from three files of a model directory: `tokenizer.json` (the
vocabulary and the algorithm), `tokenizer_config.json` and `special_tokens_map.json` (which tokens
are special). The room knows nothing of models, requests or streams.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from pagedserve.errors import RequestError, StartupError
from pagedserve.text.pieces import PieceTable

NAMED_SPECIALS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
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
        add_missing_tokens(backend, self.config, self.special_tokens)
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
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """Load the tokenizer of a checkpoint. Raises StartupError saying what is missing."""
        directory = Path(path)
        file = directory / "tokenizer.json"
        if not file.is_file():
            raise StartupError(
                f"there is no tokenizer.json in {directory}; give another directory with "
                "--tokenizer, or convert the tokenizer once with transformers' save_pretrained"
            )
        try:
            backend = Backend.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise StartupError(f"{file} cannot be read: {error}") from error
        config = read_json(directory / "special_tokens_map.json")
        config.update(read_json(directory / "tokenizer_config.json"))
        try:
            return cls(backend, config)
        except (TypeError, ValueError, AttributeError) as error:
            raise StartupError(
                f"{directory / 'tokenizer_config.json'} holds a value of the wrong type: {error}"
            ) from error

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


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`, empty when there is no such file. Raises StartupError."""
    if not path.is_file():
        return {}
    try:
        value = msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise StartupError(f"{path} cannot be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise StartupError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise StartupError(f"{path} must hold a JSON object")
    return value


def token_text(value: Any) -> str | None:
    """The text of a token as configs write it: a string, or an object with `content`."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def named_specials(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that have a name, by name."""
    named = {name: token_text(config.get(name)) for name in NAMED_SPECIALS}
    return {name: text for name, text in named.items() if text is not None}


def add_missing_tokens(
    backend: Backend, config: Mapping[str, Any], specials: Mapping[str, str]
) -> None:
    """Add the tokens that only `tokenizer_config.json` knows of, as transformers does."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    listed = config.get("added_tokens_decoder") or {}
    for _, fields in sorted(listed.items(), key=lambda item: int(item[0])):
        content = token_text(fields)
        if content is None or content in known:
            continue
        flags = ("lstrip", "rstrip", "normalized", "single_word", "special")
        chosen = {flag: bool(fields[flag]) for flag in flags if flag in fields}
        backend.add_tokens([AddedToken(content, **chosen)])
        known.add(content)
    missing = [text for text in specials.values() if text not in known]
    backend.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in dict.fromkeys(missing)]
    )
