"""The generated text: repeatable, free of held-out sums, and right in every answer it teaches."""

from __future__ import annotations

import itertools
import json
import random
import re

import pytest
from bars import are_valid_calls, draw_cases, parse_calls
from chat_format import Document, to_json
from corpus import SHARES, documents, write_document
from holdout import MAX_OPERAND, held_out_sums, is_held_out_sum
from json_tasks import json_task
from schema_check import fits, parse_and_fit
from tool_tasks import tool_task

STATED_SUM = re.compile(r"(?<![\d.:-])(\d+)\s*(?:\+|plus|and)\s*(\d+)(?=(?:\s*(?:=|is)\s*(\d+))?)")


@pytest.fixture(scope="module")
def sample() -> list[Document]:
    return list(itertools.islice(documents(7), 12_000))


def test_a_seed_writes_the_same_documents_again(sample: list[Document]) -> None:
    assert list(itertools.islice(documents(7), 2000)) == sample[:2000]
    assert list(itertools.islice(documents(8), 50)) != sample[:50]


def test_every_kind_is_written(sample: list[Document]) -> None:
    assert {document.kind for document in sample} == set(SHARES)


def test_a_sixth_of_the_sums_is_held_out_in_both_orders() -> None:
    held_out = set(held_out_sums())
    assert 0.15 < len(held_out) / (MAX_OPERAND + 1) ** 2 < 0.20
    assert all((b, a) in held_out for a, b in held_out)


def test_no_text_states_a_held_out_sum(sample: list[Document]) -> None:
    num_stated = 0
    for document in sample:
        for a, b, _ in STATED_SUM.findall(document.render()):
            num_stated += 1
            assert not is_held_out_sum(int(a), int(b)), document.render()
    assert num_stated > 5_000


def test_no_problem_gives_two_numbers_of_a_held_out_sum(sample: list[Document]) -> None:
    """Word problems do not say `plus`, so every pair of numbers whose sum is told counts."""
    for document in sample:
        if document.kind != "think" or "pages" in document.render():
            continue
        question = document.messages[-2]["content"]
        answer = set(re.findall(r"\d+", document.messages[-1]["content"]))
        numbers = [int(number) for number in re.findall(r"\d+", question)]
        for a, b in itertools.combinations(numbers, 2):
            assert str(a + b) not in answer or not is_held_out_sum(a, b), document.render()


def test_every_stated_sum_is_right(sample: list[Document]) -> None:
    for document in sample:
        if document.kind in ("sum_chat", "sum_lines"):
            for a, b, total in STATED_SUM.findall(document.render()):
                assert not total or int(a) + int(b) == int(total), document.render()


@pytest.mark.parametrize("held_out", [False, True])
def test_every_json_answer_fits_its_schema(held_out: bool) -> None:
    rng = random.Random(3)
    for _ in range(1000):
        task = json_task(rng, held_out=held_out)
        answer = task.document.messages[-1]["content"]
        assert parse_and_fit(answer, task.schema)
        assert json.loads(answer) == task.expected


@pytest.mark.parametrize("held_out", [False, True])
def test_every_tool_call_is_well_formed(held_out: bool) -> None:
    rng = random.Random(4)
    for _ in range(1000):
        task = tool_task(rng, held_out=held_out)
        answer = task.document.render().rpartition("<|im_start|>assistant\n")[2]
        text = answer.removesuffix("<|im_end|>\n")
        assert are_valid_calls(text, task.signatures), text
        assert parse_calls(text) == list(task.expected)


def test_every_call_in_a_tool_conversation_fits_a_listed_tool(sample: list[Document]) -> None:
    for document in sample:
        if document.kind != "tool":
            continue
        for message in document.messages:
            for call in message.get("tool_calls", ()):
                text = f"<tool_call>\n{to_json(call['function'])}\n</tool_call>"
                assert are_valid_calls(text, document.tools), text


def test_an_unfinished_call_is_not_well_formed() -> None:
    assert parse_calls('<tool_call>\n{"name": "f", "arguments": {}}') is None
    assert parse_calls('<tool_call>\n{"name": "f"}\n</tool_call>') is None
    assert parse_calls("Hello!") is None


def test_the_schema_check_refuses_what_does_not_fit() -> None:
    schema = {
        "type": "object",
        "properties": {
            "age": {"type": "integer", "minimum": 1, "maximum": 9},
            "size": {"type": "string", "enum": ["small", "large"]},
            "tags": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["age"],
        "additionalProperties": False,
    }
    assert fits({"age": 5, "size": "small", "tags": ["a"]}, schema)
    wrong = [
        {},
        {"age": 0},
        {"age": 10},
        {"age": True},
        {"age": "5"},
        {"age": 5, "size": "tiny"},
        {"age": 5, "tags": [1]},
        {"age": 5, "other": 1},
        [],
    ]
    assert not any(fits(value, schema) for value in wrong)
    with pytest.raises(ValueError, match="pattern"):
        fits("a", {"type": "string", "pattern": "a"})


def test_the_bars_ask_only_what_training_never_wrote(sample: list[Document]) -> None:
    written = "\n".join(document.render() for document in sample)
    for case in draw_cases(100):
        if case.bar != "sums":
            assert case.prompt not in written


def test_stories_end_in_full_sentences() -> None:
    rng = random.Random(5)
    for _ in range(300):
        text = write_document(rng, "story").text
        assert text.endswith((".", "!", '"')) and not set("{}[]|") & set(text), text
