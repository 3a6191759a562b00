"""vocab.json with merges.txt gives what transformers' own class gives for the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from pagedserve.errors import StartupError
from pagedserve.models.tokenizer_classes import tokenizer_classes
from pagedserve.text.detokenizer import PieceDetokenizer, detokenizer
from pagedserve.text.tokenizer import Tokenizer
from tests.text.formats.training import byte_level_files, texts, write


def files(**config: Any) -> dict[str, Any]:
    vocab, merges = byte_level_files()
    found: dict[str, Any] = {"vocab.json": vocab, "merges.txt": merges}
    return found | ({"tokenizer_config.json": config} if config else {})


def load(directory: Path) -> Tokenizer:
    return Tokenizer.from_directory(directory, tokenizer_classes())


CONFIGS: list[dict[str, Any]] = [
    {"tokenizer_class": "GPT2Tokenizer"},
    {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True},
    {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True},
    {"tokenizer_class": "CodeGenTokenizer"},
    {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {"400": {"content": "<|im_start|>", "special": True}},
        "eos_token": "<|im_start|>",
    },
    {
        "tokenizer_class": "GPT2Tokenizer",
        "pad_token": "<pad>",
        "additional_special_tokens": ["<one>", "<two>"],
    },
]


@pytest.fixture(scope="module", params=CONFIGS, ids=range(len(CONFIGS)))
def pair(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """Ours and transformers', of the same files."""
    from transformers import AutoTokenizer

    directory = write(tmp_path_factory.mktemp("files"), files(**request.param))
    write(directory, {"config.json": {"model_type": "gpt2"}})
    return load(directory), AutoTokenizer.from_pretrained(directory)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=texts)
def test_ids_and_text_are_those_of_transformers(pair: tuple[Tokenizer, Any], text: str) -> None:
    ours, theirs = pair
    text += "<|im_start|>x<pad> <one><|endoftext|>"
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert ours.encode(text, False) == theirs.encode(text, add_special_tokens=False)
    for skip in (True, False):
        expected = theirs.decode(ids, skip_special_tokens=skip)
        assert ours.decode(ids, skip) == expected
        stream = detokenizer(ours, skip_special_tokens=skip)
        assert isinstance(stream, PieceDetokenizer)
        assert "".join([*map(stream.push, ids), stream.finish()]) == expected


def test_special_tokens_are_those_of_the_class_where_the_vocabulary_has_them(
    pair: tuple[Tokenizer, Any], tmp_path: Path
) -> None:
    ours, theirs = pair
    named = {k: v for k, v in theirs.special_tokens_map.items() if isinstance(v, str)}
    assert ours.special_tokens == named
    strange = write(tmp_path, files(tokenizer_class="QWenTokenizer"))
    assert load(strange).special_tokens == {"pad_token": "<|endoftext|>"}


def test_files_without_settings_are_read_the_plain_way(tmp_path: Path) -> None:
    tokenizer = load(write(tmp_path, files()))
    text = "the server's tokens, naïve 日本"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.special_tokens == {}


def test_added_tokens_keep_their_ids_over_a_gap(tmp_path: Path) -> None:
    config = {
        "added_tokens_decoder": {"410": {"content": "<x>"}, "405": {"content": "<y>"}},
        "pad_token": "<pad>",
    }
    tokenizer = load(write(tmp_path, files(**config)))
    assert tokenizer.encode("<x><y><pad>") == [410, 405, 411]
    assert tokenizer.decode([410, 405, 411]) == "<x><y>"


def test_broken_files_are_named(tmp_path: Path) -> None:
    vocab, merges = byte_level_files()
    lacking = json.loads(vocab)
    del lacking["a"], lacking["b"]
    broken: list[tuple[dict[str, Any], str]] = [
        ({"vocab.json": b"{broken", "merges.txt": merges}, "vocab.json with merges.txt cannot be"),
        ({"vocab.json": vocab, "merges.txt": b"one\n"}, "vocab.json with merges.txt cannot be"),
        ({"vocab.json": vocab, "merges.txt": b"z q\n"}, "merges do not fit its vocabulary"),
        ({"vocab.json": lacking, "merges.txt": b""}, "no token for 2 of the 256 bytes, such as 97"),
    ]
    for number, (content, says) in enumerate(broken):
        with pytest.raises(StartupError, match=says):
            load(write(tmp_path / str(number), content))


def test_bytes_without_a_token_become_the_unknown_one(tmp_path: Path) -> None:
    vocab = json.loads(byte_level_files()[0])
    del vocab["a"]
    content: dict[str, Any] = {
        "vocab.json": vocab, "merges.txt": b"", "tokenizer_config.json": {"unk_token": "<unk>"}
    }  # fmt: skip
    tokenizer = load(write(tmp_path, content))
    assert tokenizer.decode(tokenizer.encode("bad", False), False) == "b<unk>d"
