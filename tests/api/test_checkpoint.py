"""The text side of a checkpoint: where it comes from, and what cannot be one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pagedserve.api import checkpoint
from pagedserve.api.checkpoint import TextSide
from pagedserve.config import Config
from pagedserve.errors import StartupError
from tests.text.building import BOS, byte_level, write_checkpoint
from tests.text.formats.training import sentencepiece_model, write


def load(**options: Any) -> TextSide:
    return checkpoint.load(Config.from_options(options).model, lambda phase, detail: None)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", byte_level())


def test_another_directory_can_give_tokenizer_and_template(directory: Path, tmp_path: Path) -> None:
    write(tmp_path / "bare", {"config.json": {}})
    with pytest.raises(StartupError, match="no tokenizer in .*--tokenizer"):
        load(model=str(tmp_path / "bare"))
    text = load(model=str(tmp_path / "bare"), tokenizer=str(directory))
    assert text.tokenizer is not None and text.template is not None
    assert text.tokenizer.special_tokens["bos_token"] == BOS
    assert text.directory == tmp_path / "bare"
    with pytest.raises(StartupError, match="/nowhere"):
        load(model=str(directory), tokenizer="/nowhere")


def test_without_a_tokenizer_none_is_looked_for(tmp_path: Path) -> None:
    write(tmp_path, {"config.json": {"eos_token_id": 5}})
    text = load(model=str(tmp_path), skip_tokenizer_init=True)
    assert (text.tokenizer, text.template) == (None, None)
    assert text.generation.end_token_ids == [5]


def test_the_engine_ends_with_what_config_generation_config_and_tokenizer_say(
    directory: Path,
) -> None:
    end = byte_level().token_to_id("</s>")
    write(directory, {"config.json": {"eos_token_id": 3}})
    assert load(model=str(directory)).generation.end_token_ids == [3, end]
    write(directory, {"generation_config.json": {"eos_token_id": [7, 8]}})
    text = load(model=str(directory))
    assert text.generation.end_token_ids == [7, 8, end]
    options = Config.from_options(Config().to_builtins() | text.engine_options()).model
    assert options.model == str(directory)
    assert options.override_generation_config == {"eos_token_id": [7, 8, end]}
    chosen = load(model=str(directory), override_generation_config='{"eos_token_id": 9}')
    assert chosen.generation.end_token_ids == [9]


def test_overrides_of_config_json_are_shown_and_decide_the_end(directory: Path) -> None:
    write(directory, {"config.json": {"eos_token_id": 3, "vocab_size": 10}})
    text = load(model=str(directory), hf_overrides={"eos_token_id": 4, "vocab_size": 12})
    assert text.generation.end_token_ids[0] == 4
    assert text.lines() == [
        "config.json overridden: eos_token_id 3 → 4",
        "config.json overridden: vocab_size 10 → 12",
    ]


@pytest.mark.parametrize("flag", ["revision", "tokenizer_revision"])
def test_a_revision_of_a_directory_is_refused(flag: str, directory: Path) -> None:
    with pytest.raises(StartupError, match=f"--{flag.replace('_', '-')} v2 is for hub ids"):
        load(model=str(directory), **{flag: "v2"})


def test_a_tokenizer_from_the_hub_is_resolved_with_its_revision(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def resolve_tokenizer(name: str, revision: str | None, **options: Any) -> Path:
        asked.append((name, revision, options["offline"]))
        return directory

    monkeypatch.setattr("pagedserve.models.hub.resolve_tokenizer", resolve_tokenizer)
    load(model=str(directory), tokenizer="org/name", tokenizer_revision="v2", offline=True)
    load(model=str(directory), tokenizer="org/name")
    assert asked == [("org/name", "v2", True), ("org/name", None, False)]


def test_any_format_of_tokenizer_is_found(tmp_path: Path) -> None:
    model = sentencepiece_model("bpe, bytes, as it stands")
    write(tmp_path, {"config.json": {}, "tokenizer.model": model})
    text = load(model=str(tmp_path))
    assert text.tokenizer is not None and text.template is None
    assert text.tokenizer.decode(text.tokenizer.encode("the server")) == "the server"
    assert text.generation.end_token_ids == [2]


def test_what_the_files_say_wrongly_stops_the_start(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="--generation-config /nowhere: there is no file"):
        load(model=str(directory), generation_config="/nowhere")
    with pytest.raises(StartupError, match="chat template /nowhere/x cannot be read: No such file"):
        load(model=str(directory), chat_template="/nowhere/x")
    (directory / "generation_config.json").write_text(json.dumps({"top_p": 5}))
    with pytest.raises(StartupError, match="generation_config.json: top_p must be between"):
        load(model=str(directory))
