"""Pieces concatenate to `decode`, for every family of decoders; no piece holds half a character."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders

from pagedserve.text.detokenizer import (
    CleaningDetokenizer,
    PieceDetokenizer,
    WindowDetokenizer,
    detokenizer,
)
from pagedserve.text.tokenizer import Tokenizer
from tests.text.building import (
    BOS,
    EOS,
    WORDS,
    byte_fallback,
    byte_level,
    fused_decoder,
    metaspace_decoder,
    word_level,
    word_piece,
)
from tests.text.counting import lines_run

BYTE_LEVEL = Tokenizer(byte_level(), {"bos_token": BOS, "eos_token": EOS})
FUSED = Tokenizer(byte_fallback(fused_decoder()))
METASPACE = Tokenizer(byte_fallback(metaspace_decoder()))
WORD_PIECE = Tokenizer(word_piece())
WORD_LEVEL = Tokenizer(word_level())

texts = st.lists(
    st.sampled_from([*WORDS, BOS, EOS, "<tool>", "é", " ", "\n", "👩‍👩‍👧", "\ufffd"])
    | st.characters(exclude_categories=["Cs"]),
    max_size=30,
).map("".join)


def ids_of(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Any tokens at all, and some ids that are none."""
    return st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=40)


def pieces(tokenizer: Tokenizer, ids: list[int], skip: bool) -> list[str]:
    """What a fresh detokenizer says for each token, and at the end."""
    stream = detokenizer(tokenizer, skip_special_tokens=skip)
    return [*map(stream.push, ids), stream.finish()]


@given(ids=ids_of(BYTE_LEVEL), skip=st.booleans())
def test_byte_level_pieces_concatenate_to_decode_for_any_tokens(ids: list[int], skip: bool) -> None:
    assert "".join(pieces(BYTE_LEVEL, ids, skip)) == BYTE_LEVEL.decode(ids, skip)


@given(text=texts, skip=st.booleans())
def test_byte_level_pieces_concatenate_to_decode_for_real_text(text: str, skip: bool) -> None:
    ids = BYTE_LEVEL.encode(text)
    assert "".join(pieces(BYTE_LEVEL, ids, skip)) == BYTE_LEVEL.decode(ids, skip)


@given(text=texts)
def test_no_piece_of_whole_text_holds_half_a_character(text: str) -> None:
    text = text.replace("\ufffd", "").replace("é", "")  # the added token writes half of itself
    for tokenizer in (BYTE_LEVEL, FUSED):
        assert "\ufffd" not in "".join(pieces(tokenizer, tokenizer.encode(text, False), False))


@pytest.mark.parametrize("tokenizer", [FUSED, METASPACE], ids=["fused", "metaspace"])
@given(text=texts, skip=st.booleans())
def test_byte_fallback_pieces_concatenate_to_decode(
    tokenizer: Tokenizer, text: str, skip: bool
) -> None:
    ids = tokenizer.encode(text.replace(" ", "▁"))
    assert "".join(pieces(tokenizer, ids, skip)) == tokenizer.decode(ids, skip)


def valid_runs(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """`ids` with every run of byte tokens that is no UTF-8 cut down to its first byte, if that is
    invalid alone, for which both sides agree."""
    kept: list[int] = []
    run: list[int] = []

    def close() -> None:
        written = b"".join(map(tokenizer.token_bytes, run))
        try:
            written.decode()
        except UnicodeDecodeError:
            del run[1:]
        kept.extend(run)
        run.clear()

    for id in ids:
        if isinstance(tokenizer.pieces.piece(id), bytes):
            run.append(id)
        elif tokenizer.pieces.piece(id) is not None and id not in tokenizer.special_ids:
            close()
            kept.append(id)
    close()
    return kept


@pytest.mark.parametrize("tokenizer", [FUSED, METASPACE], ids=["fused", "metaspace"])
@given(data=st.data())
def test_byte_fallback_pieces_concatenate_to_decode_for_any_tokens(
    tokenizer: Tokenizer, data: st.DataObject
) -> None:
    ids = valid_runs(tokenizer, data.draw(ids_of(tokenizer)))
    assert "".join(pieces(tokenizer, ids, True)) == tokenizer.decode(ids, True)


def test_a_run_of_bytes_that_turns_out_invalid_keeps_its_whole_characters() -> None:
    ids = [FUSED.backend.token_to_id(f"<0x{byte:02X}>") for byte in "€".encode() + b"\xe2\x82"]
    assert pieces(FUSED, ids, True) == ["", "", "€", "", "", "\ufffd\ufffd"]
    assert FUSED.decode(ids) == "\ufffd" * 5  # what no stream could have known


@pytest.mark.parametrize("tokenizer", [WORD_PIECE, WORD_LEVEL], ids=["word piece", "no decoder"])
@given(data=st.data(), skip=st.booleans())
def test_other_decoders_are_followed_through_a_window(
    tokenizer: Tokenizer, data: st.DataObject, skip: bool
) -> None:
    ids = data.draw(ids_of(tokenizer))
    assert isinstance(detokenizer(tokenizer), WindowDetokenizer)
    assert "".join(pieces(tokenizer, ids, skip)) == tokenizer.decode(ids, skip)


@given(text=texts)
def test_the_window_agrees_with_the_table(text: str) -> None:
    """The window must hold for decoders that split characters, too."""
    ids = BYTE_LEVEL.encode(text)
    window = WindowDetokenizer(BYTE_LEVEL, True)
    assert "".join([*map(window.push, ids), window.finish()]) == BYTE_LEVEL.decode(ids)


@pytest.mark.parametrize("tokenizer", [FUSED, METASPACE, BYTE_LEVEL, WORD_PIECE])
@given(data=st.data(), skip=st.booleans())
def test_an_answer_is_what_it_adds_to_its_prompt(
    tokenizer: Tokenizer, data: st.DataObject, skip: bool
) -> None:
    prompt, answer = (
        [id for id in data.draw(ids_of(tokenizer)) if not cut_bytes(tokenizer, id)]
        for _ in range(2)
    )
    before, whole = tokenizer.decode(prompt, skip), tokenizer.decode(prompt + answer, skip)
    stream = detokenizer(tokenizer, skip_special_tokens=skip, after=prompt)
    assert before + "".join([*map(stream.push, answer), stream.finish()]) == whole


def cut_bytes(tokenizer: Tokenizer, id: int) -> bool:
    """Whether token `id` may write a part of a character."""
    try:
        tokenizer.token_bytes(id).decode()
    except UnicodeDecodeError:
        return True
    return False


def test_a_space_at_the_border_of_prompt_and_answer_stays() -> None:
    hello = FUSED.backend.token_to_id("▁hello")
    bos = FUSED.backend.token_to_id(BOS)
    for prompt, text in (([], "hello"), ([bos], "hello"), ([bos, hello], " hello")):
        stream = detokenizer(FUSED, after=prompt)
        assert stream.push(hello) == text


def test_half_a_character_at_the_end_of_a_prompt_is_not_the_answers() -> None:
    first = BYTE_LEVEL.encode("€", False)[0]
    stream = detokenizer(BYTE_LEVEL, after=[first])
    assert stream.push(BYTE_LEVEL.encode("a", False)[0]) == "a"


@given(data=st.data())
def test_cleaning_up_spaces_equals_cleaning_the_whole(data: st.DataObject) -> None:
    tokenizer = Tokenizer(word_piece(), {"clean_up_tokenization_spaces": True})
    ids = data.draw(ids_of(tokenizer))
    assert tokenizer.cleans_up
    assert isinstance(detokenizer(tokenizer), CleaningDetokenizer)
    assert "".join(pieces(tokenizer, ids, True)) == tokenizer.decode(ids)


def test_spaces_are_not_cleaned_up_for_bpe() -> None:
    tokenizer = Tokenizer(byte_level(), {"clean_up_tokenization_spaces": True})
    ids = tokenizer.encode("a . b")
    assert tokenizer.decode(ids) == "a . b" == "".join(pieces(tokenizer, ids, True))


def test_a_character_that_never_becomes_whole_is_replaced_at_the_end() -> None:
    first, second = BYTE_LEVEL.encode("€", False)[:2]
    assert pieces(BYTE_LEVEL, [first, second], True) == ["", "", "\ufffd"]


@pytest.mark.parametrize("backend", [byte_level(), word_piece()], ids=["table", "window"])
def test_a_token_costs_the_same_however_long_the_text_is(backend: Backend) -> None:
    stream, decoded = detokenizer(Tokenizer(backend)), 0
    if isinstance(stream, WindowDetokenizer):  # what the library does is seen by its arguments

        class Counting:
            id_to_token = backend.id_to_token

            def decode(self, ids: list[int], **options: bool) -> str:
                nonlocal decoded
                decoded += len(ids)
                return str(backend.decode(ids, **options))

        stream._backend = Counting()  # type: ignore[assignment]

    def push(times: int) -> None:
        for index in range(times):
            stream.push(index % 200 + 2)

    push(1000)
    decoded = 0
    first = lines_run(lambda: push(1000))
    decoded_first = decoded
    push(8000)
    decoded = 0
    assert lines_run(lambda: push(1000)) == first
    assert decoded == decoded_first


@pytest.mark.parametrize(
    ("decoder", "exact"),
    [
        (decoders.ByteLevel(), True),
        (fused_decoder(), True),
        (metaspace_decoder(), True),
        (decoders.Metaspace(), True),
        (decoders.BPEDecoder(), False),
        (decoders.Strip(" ", 1, 0), False),
        (decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]), False),
    ],
)
def test_only_decoders_that_work_token_by_token_get_a_table(decoder: object, exact: bool) -> None:
    backend = byte_fallback(decoder)
    tokenizer = Tokenizer(backend)
    assert tokenizer.pieces.exact is exact
    assert isinstance(detokenizer(tokenizer), PieceDetokenizer) is exact
    ids = tokenizer.encode("▁a▁hello日", False)
    assert "".join(pieces(tokenizer, ids, True)) == tokenizer.decode(ids)
