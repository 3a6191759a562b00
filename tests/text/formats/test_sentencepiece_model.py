"""A sentencepiece file gives the ids and the text that sentencepiece itself gives."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from sentencepiece import SentencePieceProcessor

from pagedserve.errors import StartupError
from pagedserve.models.tokenizer_classes import tokenizer_classes
from pagedserve.text.detokenizer import PieceDetokenizer, detokenizer
from pagedserve.text.tokenizer import Tokenizer
from tests.text.formats.training import (
    CORPUS,
    MODELS,
    sentencepiece_model,
    texts,
    train,
    write,
)

LLAMA = "bpe, bytes, as it stands"
each_model = pytest.mark.parametrize("name", MODELS)


def load(directory: Path, name: str = LLAMA, **config: Any) -> Tokenizer:
    files: dict[str, Any] = {"tokenizer.model": sentencepiece_model(name)}
    if config:
        files["tokenizer_config.json"] = config
    return Tokenizer.from_directory(write(directory, files), tokenizer_classes())


@functools.cache
def pair(name: str) -> tuple[Tokenizer, SentencePieceProcessor]:
    """Ours and theirs, of the same file."""
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = load(Path(directory), name)
    return tokenizer, SentencePieceProcessor(model_proto=sentencepiece_model(name))


def score(processor: SentencePieceProcessor, ids: list[int]) -> float:
    return sum(map(processor.get_score, ids))


@each_model
@settings(max_examples=250)
@given(text=texts)
def test_a_text_gets_the_ids_of_sentencepiece(name: str, text: str) -> None:
    ours, theirs = pair(name)
    # Found as such in texts, which sentencepiece never does.
    assume(not any(special in text for special in ("<unk>", "<ctl>", "<s>", "</s>")))
    ids, expected = ours.encode(text, False), theirs.encode(text)
    if ids != expected and "unigram" in name:  # of equally likely ways either may be taken
        assert score(theirs, ids) == pytest.approx(score(theirs, expected), abs=1e-4)
    else:
        assert ids == expected


@each_model
@settings(max_examples=150)
@given(text=texts)
def test_ids_give_the_text_of_sentencepiece_also_piece_by_piece(name: str, text: str) -> None:
    ours, theirs = pair(name)
    ids = [id for id in theirs.encode(text) if id != theirs.unk_id()]
    assert ours.decode(ids) == theirs.decode(ids)
    stream = detokenizer(ours)
    assert isinstance(stream, PieceDetokenizer)
    assert "".join([*map(stream.push, ids), stream.finish()]) == ours.decode(ids)


@each_model
def test_the_corpus_survives_the_way_there_and_back(name: str) -> None:
    ours, theirs = pair(name)
    for line in set(CORPUS):
        assert ours.encode(line, False) == theirs.encode(line)
        if "as it stands" in name or "no prefix" in name:
            assert ours.decode(ours.encode(line)) == line


def test_a_long_text_is_one_text(tmp_path: Path) -> None:
    ours, theirs = pair(LLAMA)
    text = "\n".join(CORPUS) * 4
    assert ours.encode(text, False) == theirs.encode(text)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("around", [{"add_bos_token": True}, {"add_eos_token": True,
                                    "add_bos_token": False}])  # fmt: skip
def test_settings_mean_what_they_mean_to_transformers(
    legacy: bool, around: dict[str, Any], tmp_path: Path
) -> None:
    """But for a part of a text that begins with a space, to which transformers' class gives no ▁ in
    front of its own; sentencepiece does, and so do this model's converted files."""
    from transformers import AutoTokenizer

    config = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, **around}
    ours = load(tmp_path, **config)
    write(tmp_path, {"config.json": {"model_type": "llama"}})
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in ["hello the server", "the<s>server</s>x", "<s>the", "a  b\n c", "日本 x", ""]:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert ours.encode(text, False) == theirs.encode(text, add_special_tokens=False)
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.special_tokens == theirs.special_tokens_map


def test_every_part_between_special_tokens_is_a_text_of_its_own_unless_legacy_is_false(
    tmp_path: Path,
) -> None:
    theirs = pair(LLAMA)[1]
    old, new = load(tmp_path / "old"), load(tmp_path / "new", legacy=False)
    text = "the<s>server</s> x"
    first, second, third = (theirs.encode(part) for part in ("the", "server", " x"))
    assert old.encode(text) == [1, *first, 1, *second, 2, *third]
    assert new.decode(new.encode(text, False), False) == text
    assert new.encode(" x", False) == third


def test_the_beginning_is_marked_unless_the_settings_say_otherwise(tmp_path: Path) -> None:
    assert load(tmp_path / "a").encode("the")[0] == 1
    assert load(tmp_path / "b", add_bos_token=False).encode("the")[0] != 1
    assert load(tmp_path / "c", add_eos_token=True).encode("the")[-1] == 2
    plain = load(tmp_path / "d", add_prefix_space=False)
    assert plain.decode(plain.encode(" the")) == " the"
    assert plain.backend.id_to_token(plain.encode("server", False)[0])[0] != "▁"


def test_null_leaves_a_setting_at_its_default(tmp_path: Path) -> None:
    names = ("add_prefix_space", "legacy", "add_bos_token", "add_eos_token")
    plain, null = load(tmp_path / "a"), load(tmp_path / "b", **dict.fromkeys(names))
    text = "the<s>server</s> x"
    assert null.encode(text) == plain.encode(text)
    assert "eos_token" not in load(tmp_path / "c", eos_token=None).special_tokens


def test_added_tokens_have_the_ids_that_the_settings_give_them(tmp_path: Path) -> None:
    size = pair(LLAMA)[1].get_piece_size()
    tokenizer = load(
        tmp_path,
        eos_token="<|end|>",
        added_tokens_decoder={
            "1": {"content": "<s>", "special": True},
            "300": {"content": "<|start|>", "special": True},  # in the place of a piece
            str(size + 1): {"content": "<|end|>", "special": True},
            str(size + 4): {"content": "<tool>", "special": False},
        },
        additional_special_tokens=["<|more|>"],
    )
    text = "<|start|>the<tool><|end|><|more|>"
    ids = tokenizer.encode(text, False)
    the = pair(LLAMA)[1].encode("the")
    assert ids == [300, *the, size + 4, size + 1, size + 5]
    assert tokenizer.decode(ids) == "the<tool>"
    assert tokenizer.decode([size, size + 1], False) == "\0" + str(size) + "<|end|>"
    assert tokenizer.special_ids >= {0, 1, 2, 300, size + 1, size + 5}


def test_ids_of_older_checkpoints_come_from_added_tokens_json(tmp_path: Path) -> None:
    size = pair(LLAMA)[1].get_piece_size()
    files: dict[str, Any] = {
        "tokenizer.model": sentencepiece_model(LLAMA),
        "added_tokens.json": {"<pad>": size + 1, "<x>": size},
        "special_tokens_map.json": {"pad_token": "<pad>", "eos_token": "</s>"},
    }
    tokenizer = Tokenizer.from_directory(write(tmp_path, files))
    assert tokenizer.encode("<x><pad>", False) == [size, size + 1]
    assert tokenizer.special_ids >= {size + 1} and size not in tokenizer.special_ids
    assert tokenizer.special_tokens["pad_token"] == "<pad>"


def test_one_token_cannot_have_two_ids(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"'<s>' the id 7, the vocabulary has it at 1"):
        load(tmp_path, added_tokens_decoder={"7": {"content": "<s>"}})


def test_a_class_whose_code_adds_tokens_is_known(tmp_path: Path) -> None:
    size = pair(LLAMA)[1].get_piece_size()
    tokenizer = load(tmp_path, tokenizer_class="ChatGLMTokenizer")
    the = pair(LLAMA)[1].encode("the")
    assert tokenizer.encode("the") == [size + 1, size + 3, *the]
    assert tokenizer.encode("[gMASK]sop<|user|>", False) == [size + 1, size + 3, size + 6]
    assert tokenizer.encode("sopthe", False) == pair(LLAMA)[1].encode("sopthe")
    ids = tokenizer.encode("<|user|>the<|assistant|>", False)
    assert ids == [size + 6, *the, size + 7]
    assert tokenizer.decode(ids) == "the"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"model_type": "word", "vocab_size": 50}, "model type WORD"),
        ({"model_type": "char", "vocab_size": 70}, "model type CHAR"),
        ({"treat_whitespace_as_suffix": True, "vocab_size": 90}, "treat_whitespace_as_suffix"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    options: dict[str, Any], says: str, tmp_path: Path
) -> None:
    raw = train(**{"model_type": "bpe", "hard_vocab_limit": False, **options})
    with pytest.raises(StartupError, match=f"{says} is not supported.*--tokenizer"):
        Tokenizer.from_directory(write(tmp_path, {"tokenizer.model": raw}))
