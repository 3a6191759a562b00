"""The chat template says what its plain-Python twin says, as servers and transformers render it."""

from __future__ import annotations

import itertools
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from build_tokenizer import save_tokenizer, train_tokenizer
from chat_format import (
    CHAT_TEMPLATE,
    MARKER_TOKENS,
    SPECIAL_TOKENS,
    THINK_REQUEST,
    Document,
    render_chat,
)
from corpus import documents
from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment
from packing import ANSWER_BIT, Encoder
from tokenizers import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(1, 1500)


@lru_cache(maxsize=1)
def template() -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(CHAT_TEMPLATE)


def render_as_servers_do(messages: Any, **variables: Any) -> str:
    return template().render(messages=messages, **variables)


def chats(num: int) -> list[Document]:
    return [d for d in itertools.islice(documents(11), num) if d.is_chat]


def test_the_template_and_its_twin_render_the_same_text() -> None:
    for document in chats(1500):
        rendered = render_as_servers_do(list(document.messages), tools=list(document.tools))
        assert rendered == document.render()


def test_a_generation_prompt_opens_the_turn_of_the_assistant() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    rendered = render_as_servers_do(messages, add_generation_prompt=True)
    assert rendered == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert rendered == render_chat(messages, add_generation_prompt=True)


def test_contents_may_be_lists_of_text_parts() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    listed = [{"role": "system", "content": parts}, {"role": "user", "content": parts}]
    plain = [{"role": "system", "content": "Hello"}, {"role": "user", "content": "Hello"}]
    assert render_as_servers_do(listed) == render_as_servers_do(plain)


def test_arguments_may_be_a_json_string_and_contents_null() -> None:
    def call(arguments: Any) -> list[dict[str, Any]]:
        function = {"name": "f", "arguments": arguments}
        tool_calls = [{"id": "1", "type": "function", "function": function}]
        return [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": None, "tool_calls": tool_calls},
            {"role": "tool", "tool_call_id": "1", "content": "{}"},
        ]

    assert render_as_servers_do(call('{"a": 1}')) == render_as_servers_do(call({"a": 1}))
    assert '{"name": "f", "arguments": {"a": 1}}' in render_as_servers_do(call({"a": 1}))


def test_enable_thinking_asks_for_thinking() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    asked = [{"role": "system", "content": THINK_REQUEST}, *messages]
    assert render_as_servers_do(messages, enable_thinking=True) == render_as_servers_do(asked)
    assert THINK_REQUEST not in render_as_servers_do(messages, enable_thinking=False)


def test_transformers_renders_the_same_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_tokenizer(tokenizer, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for document in chats(100):
        text = loaded.apply_chat_template(
            list(document.messages), tools=list(document.tools) or None, tokenize=False
        )
        assert text == document.render()
        assert loaded(text)["input_ids"] == tokenizer.encode(text).ids
        assert loaded.decode(loaded(text)["input_ids"]) == text


def test_the_vocabulary_is_full_and_every_marker_is_one_token(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == 2048
    for token in SPECIAL_TOKENS + MARKER_TOKENS:
        assert len(tokenizer.encode(f"a{token}b").ids) == 3


@pytest.mark.parametrize(
    "text",
    ["Hello, world!", "12 + 34 = 46", "你好 🙂👩‍🚀", "naïve\t\n  x", "\x00\x7f\u2028", "<think>"],
)
def test_every_text_survives_the_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_digits_are_single_tokens_that_carry_no_space(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("12 + 345").tokens == ["1", "2", "Ġ+", "Ġ", "3", "4", "5"]


def test_the_answer_bit_covers_what_the_assistant_writes(tokenizer: Tokenizer) -> None:
    def user(text: str) -> dict[str, str]:
        return {"role": "user", "content": text}

    def assistant(text: str) -> dict[str, str]:
        return {"role": "assistant", "content": text}

    document = Document("chat", (user("Hi"), assistant("Hello!"), user("Bye"), assistant("Ok.")))
    (ids,) = Encoder(tokenizer).encode([document])
    answered = [int(token) - ANSWER_BIT for token in ids if token >= ANSWER_BIT]
    text = tokenizer.decode(answered, skip_special_tokens=False)
    assert text == "Hello!<|im_end|>Ok.<|im_end|>"
