"""The bars of the demo model: prompts that training never saw, and what counts as a right answer.

It knows no model: whoever holds one completes the prompts greedily and hands the texts back.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from chat_format import render_call, render_chat
from holdout import held_out_sums
from json_tasks import json_task
from schema_check import fits, parse_and_fit
from sums import question_about
from tool_tasks import tool_task

BARS = {"sums": 98.0, "json": 95.0, "tools": 95.0}
BARS_SEED = 20_240_229
_CALL = re.compile(r"<tool_call>\n(.*?)\n</tool_call>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt, when to stop completing it, a right answer, and whether a completion passes.

    `is_exact` is stricter than the bar: every value is the one that the prompt names.
    """

    bar: str
    prompt: str
    max_tokens: int
    stop: str | None
    model_answer: str
    passes: Callable[[str], bool]
    is_exact: Callable[[str], bool]


def draw_cases(per_bar: int, *, seed: int = BARS_SEED) -> list[Case]:
    """`per_bar` cases for each bar, the same for the same seed."""
    rng = random.Random(seed)
    pairs = held_out_sums()
    rng.shuffle(pairs)
    sums = [_sum_case(rng, a, b, plain=i % 3 == 0) for i, (a, b) in enumerate(pairs[:per_bar])]
    objects = [_json_case(rng) for _ in range(per_bar)]
    return sums + objects + [_tool_case(rng) for _ in range(per_bar)]


def measure(cases: Sequence[Case], completions: Sequence[str]) -> dict[str, dict[str, float]]:
    """For each bar: how many cases, how many passed, both percentages, and whether it is met."""
    results: dict[str, dict[str, float]] = {}
    for bar, needed in BARS.items():
        pairs = [(c, text) for c, text in zip(cases, completions, strict=True) if c.bar == bar]
        if not pairs:
            continue
        passed = sum(case.passes(text) for case, text in pairs)
        exact = sum(case.is_exact(text) for case, text in pairs)
        results[bar] = {
            "cases": len(pairs),
            "passed": passed,
            "percent": round(100 * passed / len(pairs), 2),
            "exact_percent": round(100 * exact / len(pairs), 2),
            "bar": needed,
            "met": 100 * passed >= needed * len(pairs),
        }
    return results


def parse_calls(text: str) -> list[dict[str, Any]] | None:
    """The calls in an answer; None unless the answer is nothing but well-formed calls."""
    try:
        calls = [json.loads(body) for body in _CALL.findall(text)]
    except json.JSONDecodeError:
        return None
    well_formed = all(isinstance(c, dict) and c.keys() == {"name", "arguments"} for c in calls)
    return calls if calls and well_formed and not _CALL.sub("", text).strip() else None


def are_valid_calls(text: str, signatures: Sequence[dict[str, Any]]) -> bool:
    """True when every call names a given tool and its arguments fit the tool's parameters."""
    calls = parse_calls(text)
    if calls is None:
        return False
    schemas = {s["function"]["name"]: s["function"]["parameters"] for s in signatures}
    return all(
        call["name"] in schemas
        and fits(call["arguments"], {**schemas[call["name"]], "additionalProperties": False})
        for call in calls
    )


def _sum_case(rng: random.Random, a: int, b: int, *, plain: bool) -> Case:
    def is_right(text: str) -> bool:
        numbers = re.findall(r"\d+", text)
        return bool(numbers) and int(numbers[-1]) == a + b

    if plain:
        return Case("sums", f"{a} + {b} =", 8, "\n", f" {a + b}", is_right, is_right)
    prompt = _prompt([{"role": "user", "content": question_about(rng, a, b)}])
    return Case("sums", prompt, 32, None, f"{a} + {b} = {a + b}", is_right, is_right)


def _json_case(rng: random.Random) -> Case:
    task = json_task(rng, held_out=True)

    def is_valid(text: str) -> bool:
        return parse_and_fit(text, task.schema)

    def is_exact(text: str) -> bool:
        return is_valid(text) and (task.is_made_up or json.loads(text) == task.expected)

    *asked, answer = task.document.messages
    return Case("json", _prompt(asked), 320, None, answer["content"], is_valid, is_exact)


def _tool_case(rng: random.Random) -> Case:
    task = tool_task(rng, held_out=True)
    prompt = _prompt(task.document.messages[:-1], task.signatures)
    return Case(
        "tools",
        prompt,
        320,
        None,
        "\n".join(map(render_call, task.expected)),
        lambda text: are_valid_calls(text, task.signatures),
        lambda text: parse_calls(text) == list(task.expected),
    )


def _prompt(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> str:
    return render_chat(messages, tools, add_generation_prompt=True)
