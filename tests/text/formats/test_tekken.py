"""tekken.json gives what transformers' own converter and tiktoken give for it."""

from __future__ import annotations

import base64
import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import given

from pagedserve.errors import StartupError
from pagedserve.text.tokenizer import Tokenizer
from tests.text.formats.test_ranks import ranks
from tests.text.formats.training import texts, write

PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
NUM_SPECIAL = 20
CUT = 9  # ranks at the end that are only padding


def content(**changes: Any) -> dict[str, Any]:
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for token, rank in ranks().items()
    ]
    return {
        "config": {
            "pattern": PATTERN,
            "default_vocab_size": len(vocab) - CUT + NUM_SPECIAL,
            "default_num_special_tokens": NUM_SPECIAL,
            "version": "v11",
        },
        "vocab": vocab,
        "special_tokens": [
            {"rank": rank, "token_str": text, "is_control": True}
            for rank, text in enumerate(SPECIAL)
        ],
    } | changes


@functools.cache
def ours() -> Tokenizer:
    with tempfile.TemporaryDirectory() as directory:
        return Tokenizer.from_directory(write(Path(directory), {"tekken.json": content()}))


@functools.cache
def theirs() -> tiktoken.Encoding:
    kept = {token: rank for token, rank in ranks().items() if rank < len(ranks()) - CUT}
    return tiktoken.Encoding("x", pat_str=PATTERN, mergeable_ranks=kept, special_tokens={})


@given(text=texts)
def test_a_text_gets_the_ids_of_tiktoken_behind_the_special_tokens(text: str) -> None:
    for special in SPECIAL:
        text = text.replace(special, "")
    ids = ours().encode(text, False)
    assert ids == [NUM_SPECIAL + rank for rank in theirs().encode_ordinary(text)]
    assert ours().encode(text) == [1, *ids]
    assert ours().decode(ids) == text


def test_ids_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers.integrations.mistral.tokenizer import MistralConverter

    file = write(tmp_path, {"tekken.json": content()}) / "tekken.json"
    converted = MistralConverter(str(file)).converted()
    for text in ["the server", "<s>[INST] naïve 日本[/INST]</s>", "<SPECIAL_7>x", ""]:
        assert ours().encode(text, False) == converted.encode(text).ids
    assert ours().vocab_size == converted.get_vocab_size()
    assert ours().special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert ours().decode(ours().encode("[INST]the</s>")) == "the"


def test_files_without_a_list_of_special_tokens_mean_the_first_ones(tmp_path: Path) -> None:
    older = content()
    del older["special_tokens"]
    tokenizer = Tokenizer.from_directory(write(tmp_path, {"tekken.json": older}))
    text = "<s>[AVAILABLE_TOOLS][TOOL_CALLS]<pad>[SUFFIX][TOOL_CONTENT]"
    assert tokenizer.encode(text, False) == [1, 5, 9, 11, 16, 19]
    assert tokenizer.special_tokens["pad_token"] == "<pad>"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"special_tokens": None}, "TypeError"),
        ({"special_tokens": [{"rank": 1, "token_str": "x"}]}, "ranks of special_tokens are not 0"),
        ({"config": {}}, "KeyError: 'pattern'"),
        ({"vocab": [{"token_bytes": "?"}]}, "Error"),
        ({"vocab": []}, "no token for 256 of the 256 bytes"),
    ],
)
def test_a_broken_file_is_named(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    write(tmp_path, {"tekken.json": content(**changes)})
    with pytest.raises(StartupError, match=f"tekken.json.*{says}"):
        Tokenizer.from_directory(tmp_path)
