"""The protobuf is read as the library reads it; what is none is refused."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from pagedserve.errors import StartupError
from pagedserve.text.formats.sentencepiece_proto import Kind, Model, parsed, read
from tests.text.formats.training import MODELS, sentencepiece_model, train


@pytest.mark.parametrize("name", MODELS)
def test_every_field_equals_protobufs_reading(name: str) -> None:
    raw = sentencepiece_model(name)
    theirs = sentencepiece_model_pb2.ModelProto.FromString(raw)
    ours = parsed(raw)
    assert [(p.text, p.score, int(p.kind)) for p in ours.pieces] == [
        (p.piece, p.score, p.type) for p in theirs.pieces
    ]
    trainer, normalizer = theirs.trainer_spec, theirs.normalizer_spec
    assert ours.algorithm == trainer.model_type
    assert ours.byte_fallback == trainer.byte_fallback
    assert (ours.unk_id, ours.bos_id, ours.eos_id, ours.pad_id) == (
        trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id
    )  # fmt: skip
    assert ours.charsmap == normalizer.precompiled_charsmap
    assert ours.dummy_prefix == normalizer.add_dummy_prefix
    assert ours.removes_extra_spaces == normalizer.remove_extra_whitespaces
    assert ours.escapes_spaces == normalizer.escape_whitespaces


def test_fields_that_are_not_there_have_the_defaults_of_the_proto() -> None:
    theirs = sentencepiece_model_pb2.ModelProto()
    theirs.pieces.add(piece="x")
    ours = parsed(theirs.SerializeToString())
    assert (ours.pieces[0].kind, ours.pieces[0].score) == (Kind.NORMAL, 0.0)
    assert ours == Model(pieces=ours.pieces)
    trainer, normalizer = theirs.trainer_spec, theirs.normalizer_spec
    assert ours.algorithm == trainer.model_type
    assert (ours.unk_id, ours.bos_id, ours.eos_id, ours.pad_id) == (
        trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id
    )  # fmt: skip
    assert ours.dummy_prefix and normalizer.add_dummy_prefix
    assert ours.removes_extra_spaces and normalizer.remove_extra_whitespaces


def test_ids_may_be_absent() -> None:
    ours = parsed(train(model_type="bpe", vocab_size=80, bos_id=-1, eos_id=-1, pad_id=1))
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (-1, -1, 1)


def test_a_file_that_is_cut_or_none_is_named(tmp_path: Path) -> None:
    raw = sentencepiece_model("bpe, bytes, as it stands")
    file = tmp_path / "tokenizer.model"
    for content in (raw[:-1], raw[: len(raw) // 2], b"", b"version https://git-lfs", b"\xff" * 20):
        file.write_bytes(content)
        with pytest.raises(StartupError, match="tokenizer.model is no sentencepiece model"):
            read(file)
    with pytest.raises(StartupError, match="cannot be read"):
        read(tmp_path)


@settings(max_examples=300)
@given(raw=st.binary(max_size=60))
def test_any_bytes_are_a_model_or_a_start_error(raw: bytes) -> None:
    with contextlib.suppress(ValueError, IndexError, TypeError, AttributeError):
        assert isinstance(parsed(raw), Model)
