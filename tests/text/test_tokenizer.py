"""The tokenizer of a directory: equal to transformers' for every setting that it reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedserve.errors import RequestError, StartupError
from pagedserve.text.tokenizer import Tokenizer
from tests.text.building import (
    BOS,
    EOS,
    byte_fallback,
    byte_level,
    fused_decoder,
    word_piece,
    write_checkpoint,
)

CONFIGS: list[dict[str, Any]] = [
    {},
    {"add_bos_token": False, "add_eos_token": True},  # tokenizer.json says it, not these
    {"eos_token": {"__type": "AddedToken", "content": "<|end|>", "special": True}},
    {"pad_token": "stop"},  # in the vocabulary, made special by the config alone
    {"added_tokens_decoder": {"900": {"content": "<extra>", "special": False}}},
    {"additional_special_tokens": ["stop", "<extra>"]},
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("backend", [byte_level, lambda: byte_fallback(fused_decoder())])
def test_encode_and_decode_equal_transformers(
    backend: Any, config: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import PreTrainedTokenizerFast

    directory = write_checkpoint(tmp_path, backend(), **config)
    theirs = PreTrainedTokenizerFast.from_pretrained(directory)
    ours = Tokenizer.from_directory(directory)
    for text in [
        "hello world",
        "日本 <extra> stop xstopx",
        f"{BOS}a{EOS}<|end|>",
        "",
        " x . y 's 😀",
    ]:
        for add in (True, False):
            ids = ours.encode(text, add)
            assert ids == theirs.encode(text, add_special_tokens=add)
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.vocab_size == len(theirs)
    assert ours.special_tokens == {
        name: text for name, text in theirs.special_tokens_map.items() if isinstance(text, str)
    }


def test_special_tokens_of_a_class_hold_where_the_vocabulary_has_them(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, byte_level(), tokenizer_class="Known", eos_token=None)
    usual = {"Known": {"specials": {"eos_token": EOS, "pad_token": "<pad>", "bos_token": "x"}}}
    tokenizer = Tokenizer.from_directory(directory, usual)
    assert tokenizer.special_tokens == {"bos_token": BOS, "eos_token": EOS}
    assert tokenizer.end_id == byte_level().token_to_id(EOS)
    assert tokenizer.vocab_size == byte_level().get_vocab_size()
    assert Tokenizer.from_directory(directory).end_id is None


def test_cleaning_up_equals_transformers(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    directory = write_checkpoint(
        tmp_path, word_piece(), clean_up_tokenization_spaces=True, bos_token=None, eos_token=None
    )
    ids = [8, 2, 3, 4, 5, 10, 4, 11, 9]
    theirs = PreTrainedTokenizerFast.from_pretrained(directory)
    assert Tokenizer.from_directory(directory).decode(ids) == theirs.decode(ids)


def test_a_directory_without_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"no tokenizer\.json.*--tokenizer"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_file_is_named(file: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, byte_level())
    (tmp_path / file).write_text("{broken")
    with pytest.raises(StartupError, match=file):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("tokens", [[5], {"x": {"content": "a"}}, 5])
def test_a_config_of_the_wrong_types_is_named(tokens: Any, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, byte_level(), added_tokens_decoder=tokens)
    with pytest.raises(StartupError, match="tokenizer_config.json holds a value of the wrong type"):
        Tokenizer.from_directory(tmp_path)


def test_half_a_surrogate_pair_is_no_text() -> None:
    with pytest.raises(RequestError, match="surrogates not allowed at character 2"):
        Tokenizer(byte_level()).encode("ab\ud800")


def test_tokens_are_shown_as_text_or_as_their_bytes() -> None:
    tokenizer = Tokenizer(byte_level())
    (cat,) = tokenizer.encode(" cat", False)
    half = tokenizer.encode("€", False)[0]
    assert (tokenizer.token_string(cat), tokenizer.token_bytes(cat)) == (" cat", b" cat")
    assert (tokenizer.token_string(half), tokenizer.token_bytes(half)) == ("bytes:\\xe2", b"\xe2")
    assert tokenizer.token_string(10**6) == ""


@given(st.text(max_size=20))
def test_token_bytes_concatenate_to_the_text(text: str) -> None:
    tokenizer = Tokenizer(byte_level())
    ids = tokenizer.encode(text.replace("é", ""), False)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text.replace("é", "")
