"""Through the door: a model's own defaults, other formats of tokenizers, and no chat template."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.api.serving import Server
from tests.api.toy_engine import MAX_MODEL_LEN
from tests.text.building import byte_level, write_checkpoint
from tests.text.formats.training import sentencepiece_model, write

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def advised(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A model with a generation_config.json and a changed config.json."""
    directory = write_checkpoint(tmp_path_factory.mktemp("advised"), byte_level())
    values = {"temperature": 0.5, "top_k": 9, "max_new_tokens": 5, "num_beams": 3}
    write(directory, {"generation_config.json": values})
    options: dict[str, Any] = {
        "model": str(directory),
        "served_model_name": "advised",
        "override_generation_config": {"top_k": 8},
        "hf_overrides": {"max_position_embeddings": 99},
    }
    with Server(tmp_path_factory.mktemp("log") / "log", **options) as server:
        yield server.until_ready()


@pytest.fixture(scope="module")
def stopping(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A model that is to stop at a text, and not before some tokens."""
    directory = write_checkpoint(tmp_path_factory.mktemp("stopping"), byte_level())
    write(directory, {"generation_config.json": {"stop_strings": ["llo"], "min_new_tokens": 8}})
    with Server(tmp_path_factory.mktemp("log") / "log", model=str(directory)) as server:
        yield server.until_ready()


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A model with a sentencepiece tokenizer and no chat template."""
    model = sentencepiece_model("bpe, bytes, as it stands")
    directory = write(
        tmp_path_factory.mktemp("bare"), {"config.json": {}, "tokenizer.model": model}
    )
    with Server(tmp_path_factory.mktemp("log") / "log", model=str(directory)) as server:
        yield server.until_ready()


def complete(server: Server, **body: Any) -> dict[str, Any]:
    answer = server.http.post("/v1/completions", json={"prompt": "hello", **body})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def num_tokens(server: Server, **body: Any) -> int:
    return int(complete(server, **body)["usage"]["completion_tokens"])


def test_the_models_defaults_are_shown(advised: Server) -> None:
    (card,) = advised.http.get("/v1/models").json()["data"]
    shown = card["pagedserve"]
    assert shown["default_sampling_params"] == {"temperature": 0.5, "top_k": 8, "max_tokens": 5}
    assert shown["not_applied"] == {"num_beams": 3}
    source = "generation_config.json with --override-generation-config"
    assert shown["generation_config"] == source
    assert shown["hf_overrides"] == {"max_position_embeddings": 99}
    assert shown["chat_template"] is True
    assert shown["end_token_ids"] == [byte_level().token_to_id("</s>")]
    lines = [line.strip() for line in advised.output.splitlines()]
    assert f"sampling defaults: temperature 0.5, top_k 8, max_tokens 5 ({source})" in lines
    assert f"not applied from {source}: num_beams 3" in lines
    assert "config.json overridden: max_position_embeddings 99 (not in config.json)" in lines


def test_the_models_stop_strings_hold_unless_a_request_has_its_own(stopping: Server) -> None:
    chat = {"messages": HELLO, "ignore_eos": True}
    answer = stopping.http.post("/v1/chat/completions", json=chat).json()
    for whole in (complete(stopping), answer):
        (choice,) = whole["choices"]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "llo")
        assert whole["usage"]["completion_tokens"] > 8
    (at_once,) = complete(stopping, min_tokens=0)["choices"]
    assert at_once["stop_reason"] == "llo" and at_once["text"].endswith("he")
    assert num_tokens(stopping, min_tokens=0) <= 8
    assert num_tokens(stopping, stop=[]) == 16
    assert complete(stopping, stop="e")["choices"][0]["stop_reason"] == "e"
    assert num_tokens(stopping, max_tokens=3) == 3  # a default gives way to what was asked for
    assert num_tokens(stopping, max_tokens=0, echo=True) == 0


def test_the_models_number_of_tokens_holds_where_a_request_leaves_it_out(advised: Server) -> None:
    assert num_tokens(advised) == 5
    assert num_tokens(advised, max_tokens=7) == 7
    chat = advised.http.post("/v1/chat/completions", json={"messages": HELLO}).json()
    assert chat["usage"]["completion_tokens"] == 5
    longer = {"messages": HELLO, "max_tokens": 8}
    chat = advised.http.post("/v1/chat/completions", json=longer).json()
    assert chat["usage"]["completion_tokens"] == 8


def test_less_is_written_where_less_fits(advised: Server) -> None:
    prompt = [5] * (MAX_MODEL_LEN - 3)
    assert num_tokens(advised, prompt=prompt) == 3


def test_without_a_chat_template_a_chat_is_refused_with_what_to_do(bare: Server) -> None:
    for stream in (False, True):
        body = {"messages": HELLO, "stream": stream}
        answer = bare.http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("no_chat_template", "messages")
        assert "--chat-template FILE" in error["message"]
        assert "/v1/completions" in error["message"]
    (card,) = bare.http.get("/v1/models").json()["data"]
    assert card["pagedserve"]["chat_template"] is False
    assert card["pagedserve"]["default_sampling_params"] == {}
    assert "/v1/completions -H" in bare.output  # the line to try


def test_a_sentencepiece_model_speaks_through_the_door(bare: Server) -> None:
    # The toy writes the prompt back, <s> first: what follows the prompt keeps its space.
    text = complete(bare, prompt="the server", max_tokens=3)["choices"][0]["text"]
    assert text == " the server"
    echoed = complete(bare, prompt="naïve 日本", max_tokens=9, echo=True)["choices"][0]["text"]
    assert echoed.startswith("naïve 日本 naïve")


def test_a_chat_template_from_a_file_is_used_and_begins_once(
    bare: Server, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{{ bos_token }}{{ messages[0].content }}")
    model = sentencepiece_model("bpe, bytes, as it stands")
    directory = write(tmp_path / "model", {"config.json": {}, "tokenizer.model": model})
    options = {"model": str(directory), "chat_template": str(file)}
    with Server(tmp_path / "log", **options) as server:
        server.until_ready()
        body = {"messages": HELLO, "max_tokens": 1}
        usage = server.http.post("/v1/chat/completions", json=body).json()["usage"]
        plain = complete(bare, prompt="hello", max_tokens=1)["usage"]
        assert usage["prompt_tokens"] == plain["prompt_tokens"]
