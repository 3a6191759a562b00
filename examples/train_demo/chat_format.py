"""The shape of a conversation as text: markers, the chat template, and its plain-Python twin.

    <|im_start|>system
    You are helpful.

    <tools>
    {"type": "function", "function": {...}}
    </tools>
    ...<|im_end|>
    <|im_start|>user
    Hello!<|im_end|>
    <|im_start|>assistant
    Hi there!<|im_end|>

The twin is what the corpus is written with; a test holds the two equal. It knows no task.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
# Ordinary tokens: they stay in decoded text, where parsers look for them.
MARKER_TOKENS = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<tools>",
    "</tools>",
)
ASSISTANT_HEADER = f"{TURN_START}assistant\n"
THINK_REQUEST = "Think between <think> and </think> before you answer."
TOOLS_INTRO = "You can call these functions:"
TOOLS_OUTRO = (
    "To call one, answer with:\n"
    '<tool_call>\n{"name": "the function", "arguments": {"argument": "value"}}\n</tool_call>'
)

CHAT_TEMPLATE = (
    """\
{%- macro text_of(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content is iterable and content is not mapping -%}
        {%- for part in content if part.text is defined -%}
            {{- part.text -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set turns = namespace(rest=messages, in_tools=false) -%}
{%- set system = namespace(text='') -%}
{%- if messages and messages[0].role in ['system', 'developer'] -%}
    {%- set system.text = text_of(messages[0].content) -%}
    {%- set turns.rest = messages[1:] -%}
{%- endif -%}
{%- if enable_thinking is defined and enable_thinking -%}
    {%- set system.text = (system.text ~ '\\n' if system.text else '') ~ '@THINK@' -%}
{%- endif -%}
{%- if system.text or tools -%}
    {{- '<|im_start|>system\\n' ~ system.text -}}
    {%- if tools -%}
        {{- ('\\n\\n' if system.text else '') ~ '@INTRO@\\n<tools>' -}}
        {%- for tool in tools -%}
            {{- '\\n' -}}{{- tool | tojson -}}
        {%- endfor -%}
        {{- '\\n</tools>\\n@OUTRO@' -}}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in turns.rest -%}
    {%- if message.role == 'tool' -%}
        {%- if not turns.in_tools -%}
            {{- '<|im_start|>user' -}}
        {%- endif -%}
        {{- '\\n<tool_response>\\n' ~ text_of(message.content) ~ '\\n</tool_response>' -}}
        {%- set turns.in_tools = not loop.last and loop.nextitem.role == 'tool' -%}
        {%- if not turns.in_tools -%}
            {{- '<|im_end|>\\n' -}}
        {%- endif -%}
    {%- else -%}
        {{- '<|im_start|>' ~ message.role ~ '\\n' -}}
        {%- set body = text_of(message.content) -%}
        {{- body -}}
        {%- if message.tool_calls is defined and message.tool_calls -%}
            {%- for call in message.tool_calls -%}
                {%- set function = call.function if call.function is defined else call -%}
                {{- '\\n' if body or not loop.first else '' -}}
                {{- '<tool_call>\\n{"name": "' ~ function.name ~ '", "arguments": ' -}}
                {%- if function.arguments is string -%}
                    {{- function.arguments -}}
                {%- else -%}
                    {{- function.arguments | tojson -}}
                {%- endif -%}
                {{- '}\\n</tool_call>' -}}
            {%- endfor -%}
        {%- endif -%}
        {{- '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
""".replace("@THINK@", THINK_REQUEST)
    .replace("@INTRO@", TOOLS_INTRO)
    .replace("@OUTRO@", TOOLS_OUTRO.replace("\n", "\\n"))
)

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Document:
    """One piece of training text: a conversation, or plain `text` when `messages` is empty."""

    kind: str
    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    text: str = ""

    @property
    def is_chat(self) -> bool:
        return bool(self.messages)

    def render(self) -> str:
        """The text as the model reads it, up to but not including the end-of-text token."""
        return render_chat(self.messages, self.tools) if self.messages else self.text


def to_json(value: object) -> str:
    """JSON as the template's `tojson` writes it."""
    return json.dumps(value, ensure_ascii=False)


def render_call(function: dict[str, Any]) -> str:
    """A tool call in the Hermes layout, from its `name` and `arguments`."""
    call = {"name": function["name"], "arguments": function["arguments"]}
    return f"<tool_call>\n{to_json(call)}\n</tool_call>"


def render_chat(
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] = (),
    *,
    add_generation_prompt: bool = False,
) -> str:
    """What the chat template renders, without jinja; contents are strings here."""
    pieces = []
    rest = list(messages)
    system = rest.pop(0)["content"] if rest and rest[0]["role"] == "system" else ""
    if system or tools:
        pieces.append(_turn("system", _system_text(system, tools)))
    for index, message in enumerate(rest):
        if message["role"] == "tool":
            first = index == 0 or rest[index - 1]["role"] != "tool"
            last = index + 1 == len(rest) or rest[index + 1]["role"] != "tool"
            pieces.append(f"{TURN_START}user" if first else "")
            pieces.append(f"\n<tool_response>\n{message['content']}\n</tool_response>")
            pieces.append(f"{TURN_END}\n" if last else "")
        else:
            pieces.append(_turn(message["role"], _body(message)))
    if add_generation_prompt:
        pieces.append(ASSISTANT_HEADER)
    return "".join(pieces)


def _turn(role: str, body: str) -> str:
    return f"{TURN_START}{role}\n{body}{TURN_END}\n"


def _system_text(system: str, tools: Sequence[dict[str, Any]]) -> str:
    if not tools:
        return system
    listed = "".join("\n" + to_json(tool) for tool in tools)
    gap = "\n\n" if system else ""
    return f"{system}{gap}{TOOLS_INTRO}\n<tools>{listed}\n</tools>\n{TOOLS_OUTRO}"


def _body(message: Message) -> str:
    calls = [render_call(call["function"]) for call in message.get("tool_calls", ())]
    return "\n".join(([message["content"]] if message.get("content") else []) + calls)
