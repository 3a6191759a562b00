"""A file of ranks gives what tiktoken gives for it."""

from __future__ import annotations

import base64
import functools
import json
import tempfile
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import given

from pagedserve.errors import StartupError
from pagedserve.models.tokenizer_classes import tokenizer_classes
from pagedserve.text.detokenizer import PieceDetokenizer, detokenizer
from pagedserve.text.pieces import byte_alphabet
from pagedserve.text.tokenizer import Tokenizer
from tests.text.formats.training import byte_level_files, texts, write

CLASSES = ("QWenTokenizer", "ChatGLM4Tokenizer", "TikTokenTokenizer")
MASKS = ["[gMASK]", "<sop>"]
IM_END = {"content": "<|im_end|>", "special": True}


@functools.cache
def ranks() -> dict[bytes, int]:
    """Of a trained byte-level vocabulary, the bytes first, as tiktoken has them."""
    alphabet = byte_alphabet()
    vocab = json.loads(byte_level_files(500)[0])
    tokens = [t for t in sorted(vocab, key=vocab.__getitem__) if t != "<|endoftext|>"]
    spelled = [bytes(alphabet[char] for char in token) for token in tokens]
    return {token: rank for rank, token in enumerate(dict.fromkeys(spelled))}


def rank_file() -> bytes:
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks().items())
    return b"".join(lines)


def load(directory: Path, name: str = "tokenizer.model", **config: Any) -> Tokenizer:
    files: dict[str, Any] = {name: rank_file(), "tokenizer_config.json": config}
    return Tokenizer.from_directory(write(directory, files), tokenizer_classes())


@functools.cache
def pair(kind: str) -> tuple[Tokenizer, tiktoken.Encoding]:
    """Ours and theirs, of the same ranks and the same way to split."""
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = load(Path(directory), tokenizer_class=kind, additional_special_tokens=MASKS)
    pattern = tokenizer_classes()[kind]["split_pattern"]
    theirs = tiktoken.Encoding(
        kind, pat_str=pattern, mergeable_ranks=ranks(), special_tokens={"<|x|>": 10**6}
    )
    return tokenizer, theirs


@pytest.mark.parametrize("kind", CLASSES)
@given(text=texts)
def test_a_text_gets_the_ids_of_tiktoken(kind: str, text: str) -> None:
    ours, theirs = pair(kind)
    if kind == "QWenTokenizer":
        text = unicodedata.normalize("NFC", text)
    ids = ours.encode(text, False)
    assert ids == theirs.encode_ordinary(text)
    stream = detokenizer(ours)
    assert isinstance(stream, PieceDetokenizer)
    assert "".join([*map(stream.push, ids), stream.finish()]) == text == ours.decode(ids)


def test_a_text_is_normalised_where_its_class_says_so() -> None:
    ours, theirs = pair("QWenTokenizer")
    assert ours.encode("e\u0301") == theirs.encode_ordinary("é")


def test_special_tokens_follow_the_ranks(tmp_path: Path) -> None:
    n = len(ranks())
    qwen = load(tmp_path / "q", "qwen.tiktoken", tokenizer_class="QWenTokenizer")
    text = "<|endoftext|><|im_start|>the<|im_end|><|extra_0|><|extra_204|>"
    the = pair("QWenTokenizer")[1].encode_ordinary("the")
    assert qwen.encode(text) == [n, n + 1, *the, n + 2, n + 3, n + 207]
    assert qwen.decode(qwen.encode(text)) == "the"
    assert qwen.vocab_size == n + 208
    assert qwen.special_tokens["eos_token"] == "<|im_end|>"

    kimi = load(
        tmp_path / "k",
        "tiktoken.model",
        tokenizer_class="TikTokenTokenizer",
        added_tokens_decoder={str(n + 2): IM_END},
        eos_token="<|im_end|>",
    )
    tail = f"<|im_end|><|reserved_token_{n}|><|reserved_token_{n + 255}|>"
    assert kimi.encode(tail) == [n + 2, n, n + 255]
    assert kimi.vocab_size == n + 256


def test_prefix_tokens_stand_before_a_text_and_not_in_a_rendered_chat(tmp_path: Path) -> None:
    n = len(ranks())
    added = {str(n + at): {"content": text, "special": True} for at, text in enumerate(MASKS)}
    glm = load(tmp_path, tokenizer_class="ChatGLM4Tokenizer", added_tokens_decoder=added)
    the = pair("ChatGLM4Tokenizer")[1].encode_ordinary("the")
    assert glm.encode("the") == [n, n + 1, *the]
    assert glm.encode("[gMASK]<sop>the", False) == [n, n + 1, *the]
    with pytest.raises(StartupError, match=r"begin with \[gMASK\] <sop>, which its vocabulary"):
        load(tmp_path, tokenizer_class="ChatGLM4Tokenizer")


def test_ranks_without_a_known_way_to_split_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="'Strange' is not known; give .* with --tokenizer"):
        load(tmp_path, tokenizer_class="Strange")
    given = load(tmp_path, split_pattern=r"\w+|\W+")
    assert given.decode(given.encode("the server")) == "the server"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"IQ== 0\nIg== x\n", "line 2 is not a token and its rank"),
        (b"IQ== 0\n\nI?== 1\n", "line 3 is not a token and its rank"),
        (b"IQ== 0\nIg== 0\n", "a rank stands for more than one token"),
        (b"IQ== 0\n", "no token for 255 of the 256 bytes"),
    ],
)
def test_a_broken_file_is_named(content: bytes, says: str, tmp_path: Path) -> None:
    files: dict[str, Any] = {
        "a.tiktoken": content, "tokenizer_config.json": {"tokenizer_class": "QWenTokenizer"}
    }  # fmt: skip
    with pytest.raises(StartupError, match=f"a.tiktoken.*{says}"):
        Tokenizer.from_directory(write(tmp_path, files), tokenizer_classes())
