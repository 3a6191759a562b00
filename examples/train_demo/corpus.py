"""Mixes the kinds of text into the training corpus; it knows their shares, not their contents."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from chat_format import Document
from json_tasks import json_task
from smalltalk import conversation, thinking_fact
from stories import story, story_chat
from sums import sum_chat, sum_lines, thinking_chat
from tool_tasks import tool_chat

Writer = Callable[[random.Random], Document]


def _json_chat(rng: random.Random) -> Document:
    return json_task(rng).document


def _thinking(rng: random.Random) -> Document:
    return thinking_fact(rng) if rng.random() < 0.1 else thinking_chat(rng)


WRITERS: dict[str, Writer] = {
    "chat": conversation,
    "story": story,
    "story_chat": story_chat,
    "sum_chat": sum_chat,
    "sum_lines": sum_lines,
    "think": _thinking,
    "json": _json_chat,
    "tool": tool_chat,
}
# By document, not by token: a story is ten times as long as a sum.
SHARES = {
    "chat": 18,
    "story": 7,
    "story_chat": 4,
    "sum_chat": 22,
    "sum_lines": 14,
    "think": 10,
    "json": 24,
    "tool": 16,
}


def write_document(rng: random.Random, kind: str) -> Document:
    """One document of one kind."""
    return WRITERS[kind](rng)


def documents(seed: int) -> Iterator[Document]:
    """An endless stream of documents, the same for the same seed."""
    rng = random.Random(seed)
    kinds, shares = list(SHARES), list(SHARES.values())
    while True:
        yield write_document(rng, rng.choices(kinds, shares)[0])
