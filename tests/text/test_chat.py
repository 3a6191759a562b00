"""Messages to prompts: equal to transformers' rendering, errors that name the place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pagedserve.errors import RequestError, StartupError
from pagedserve.text.chat import ChatTemplate, check_messages, find_template, load_text
from tests.text.building import CHAT_TEMPLATE, byte_level, write_checkpoint

USER = {"role": "user", "content": "hi <b> 日本"}
EACH = "{% for m in messages %}"
TEMPLATES = [
    CHAT_TEMPLATE,
    EACH + "\n  {% if loop.last %}{{ m.content | tojson }}{% endif %}\n{% endfor %}",
    EACH + "{% if m.role == 'x' %}{% continue %}{% endif %}{{ m | tojson }}{% endfor %}",
    "{% set ns = namespace(n=0) %}" + EACH + "{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    EACH + "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{{ tools is none }}{{ documents is defined }}{{ eos_token }}{{ messages | tojson(indent=2) }}",
    "{{ strftime_now('%Y') | length }}",
]


@pytest.mark.parametrize("source", TEMPLATES)
def test_rendering_equals_transformers(source: str, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    directory = write_checkpoint(tmp_path, byte_level(), chat_template=source)
    theirs = PreTrainedTokenizerFast.from_pretrained(directory)
    _, ours = load_text(directory)
    assert ours is not None
    messages = [{"role": "system", "content": "be kind"}, USER]
    assert ours.render(messages) == theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[7].content.x }}",
        "{{ messages | sum }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}{% endfor %}",
    ],
)
def test_a_template_that_fails_is_the_requests_error(source: str) -> None:
    with pytest.raises(RequestError, match="chat template refused") as caught:
        ChatTemplate(source, {}).render([USER])
    assert caught.value.param == "messages"


def test_what_a_template_says_reaches_the_client() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(RequestError, match="roles must alternate"):
        template.render([USER])


def test_a_template_that_is_none_stops_the_start() -> None:
    with pytest.raises(StartupError, match="cannot be compiled"):
        ChatTemplate("{% for %}", {})


def test_the_developer_is_the_system_where_a_template_knows_no_developer() -> None:
    message = {"role": "developer", "content": "x"}
    assert ChatTemplate("{{ messages[0].role }}", {}).render([message]) == "system"
    knows = "{% if messages[0].role == 'developer' %}yes{% endif %}"
    assert ChatTemplate(knows, {}).render([message]) == "yes"


def test_templates_are_found_in_the_order_of_transformers(tmp_path: Path) -> None:
    assert find_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": [{"name": "default", "template": "named"}]})
    )
    assert find_template(tmp_path) == "named"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert find_template(tmp_path) == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert find_template(tmp_path) == "jinja"
    (tmp_path / "mine").write_text("mine")
    assert find_template(tmp_path, str(tmp_path / "mine")) == "mine"
    with pytest.raises(StartupError, match="cannot be read"):
        find_template(tmp_path, str(tmp_path / "none"))


@pytest.mark.parametrize("name", ["chat_template.jinja", "mine"])
def test_a_template_that_is_not_utf_8_names_its_file(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"ok \xff")
    override = str(tmp_path / name) if name == "mine" else None
    with pytest.raises(StartupError, match=f"{name} cannot be read: it is not UTF-8 at byte 3"):
        find_template(tmp_path, override)


@pytest.mark.parametrize("entries", [[5], [{"name": "default"}], [{"template": "x"}]])
def test_named_templates_without_name_or_template_are_refused(
    entries: list[Any], tmp_path: Path
) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": entries}))
    with pytest.raises(StartupError, match="chat_template in .*tokenizer_config.json must be"):
        find_template(tmp_path)


def test_of_several_templates_one_can_be_chosen_by_its_name(tmp_path: Path) -> None:
    config: dict[str, Any] = {"chat_template": {"default": "one", "tools": "two"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert find_template(tmp_path) == "one"
    assert find_template(tmp_path, "tools") == "two"
    with pytest.raises(StartupError, match="rag cannot be read: .*by name: default, tools"):
        find_template(tmp_path, "rag")
    del config["chat_template"]["default"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(StartupError, match="several chat templates, tools, and none is the defau"):
        find_template(tmp_path)


@pytest.mark.parametrize("value", [5, {"default": None}, True])
def test_a_template_of_the_wrong_type_is_named(value: Any, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    with pytest.raises(StartupError, match="chat_template in .*tokenizer_config.json must be text"):
        find_template(tmp_path)


def test_a_template_that_cannot_be_compiled_names_its_place(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "own", byte_level(), chat_template="{% for %}")
    with pytest.raises(StartupError, match=f"compiled.*from {directory}; give another with --chat"):
        load_text(directory)
    file = tmp_path / "mine.jinja"
    file.write_text("{{ }")
    with pytest.raises(StartupError, match=f"compiled.*from {file}"):
        load_text(directory, chat_template=str(file))


def test_messages_come_out_as_templates_take_them() -> None:
    given = [
        {
            "role": "system",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        },
        {"role": "user", "content": "c", "name": "Ann"},
        # as an SDK sends an earlier answer back
        {"role": "assistant", "content": "d", "refusal": None, "tool_calls": None, "audio": None},
    ]
    assert check_messages(given) == [
        {"role": "system", "content": "a\nb"},
        {"role": "user", "content": "c", "name": "Ann"},
        {"role": "assistant", "content": "d"},
    ]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ("hi", "messages"),
        ([], "messages"),
        ([1], "messages[0]"),
        ([{}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "king", "content": "x"}], "messages[0].role"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role"),
        ([USER, {"role": "user", "content": 5}], "messages[1].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": "x", "name": 5}], "messages[0].name"),
        ([{"role": "user", "content": "x", "mood": "good"}], "messages[0].mood"),
        ([{"role": "assistant", "content": "", "tool_calls": [{}]}], "messages[0].tool_calls"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
    ],
)
def test_a_bad_message_is_refused_by_its_place(messages: Any, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_messages(messages)
    assert caught.value.param == param
