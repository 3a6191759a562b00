"""Writes additions: as chat, as plain lines, and worked out loud; it never adds a held-out pair."""

from __future__ import annotations

import random

from chat_format import THINK_REQUEST, Document, Message
from holdout import draw_sum, is_held_out_sum
from words import COUNTABLE, DAYS, NAMES

QUESTIONS = (
    "What is {a} + {b}?",
    "What is {a} + {b}?",
    "What's {a} + {b}?",
    "What is {a} plus {b}?",
    "What's {a} plus {b}?",
    "what is {a}+{b}",
    "{a} + {b}",
    "{a}+{b}",
    "{a} + {b} = ?",
    "{a} + {b} =",
    "{a}+{b}=?",
    "Add {a} and {b}.",
    "How much is {a} + {b}?",
    "How much is {a} plus {b}?",
    "Calculate {a} + {b}.",
    "Compute {a} + {b}.",
    "Please add {a} and {b}.",
    "Can you add {a} and {b}?",
    "Can you tell me what {a} + {b} is?",
    "What is the sum of {a} and {b}?",
    "Give me the sum of {a} and {b}.",
    "Solve {a} + {b}.",
)
NUMBER_ONLY = (
    " Answer with only the number.",
    " Just the number, please.",
    " Reply with the number only.",
)
SYSTEMS = (
    "You are a helpful assistant.",
    "You are good at sums.",
    "You are a careful calculator.",
    "You are a friendly assistant.",
    "Answer briefly.",
)
THINK_SYSTEMS = (
    THINK_REQUEST,
    THINK_REQUEST,
    "You are a helpful assistant.\n" + THINK_REQUEST,
    "Think step by step in <think> tags, then answer.",
)
THINK_ASIDES = (" Think first.", " Think step by step.", " Think before you answer.")
PLACES = ("Ones", "Tens", "Hundreds", "Thousands")
WORD_PROBLEMS = (
    (
        "{x} has {a} {things}. {y} gives {x} {b} more. How many {things} does {x} have now?",
        "{x} starts with {a} {things} and gets {b} more, so I add.",
        "{x} has {c} {things} now.",
    ),
    (
        "{x} finds {a} {things} in the morning and {b} {things} in the evening. "
        "How many {things} does {x} find in all?",
        "I add the morning and the evening.",
        "{x} finds {c} {things} in all.",
    ),
    (
        "There are {a} {things} in a box and {b} {things} on a shelf. "
        "How many {things} are there together?",
        "I add the box and the shelf.",
        "There are {c} {things} together.",
    ),
    (
        "{x} has {a} {things}. {y} has {b} {things}. How many {things} do they have together?",
        "I add the {things} of {x} and the {things} of {y}.",
        "They have {c} {things} together.",
    ),
    (
        "A shop sold {a} {things} on {day} and {b} {things} the day after. "
        "How many {things} did it sell in total?",
        "I add the two days.",
        "The shop sold {c} {things} in total.",
    ),
    (
        "{x} read {a} pages on {day} and then {b} more pages. How many pages did {x} read?",
        "{x} read {a} pages and then {b} more, so I add.",
        "{x} read {c} pages.",
    ),
)


def draw_operands(rng: random.Random) -> tuple[int, int]:
    """Mostly two operands below 100; a share of larger ones keeps addition a rule, not a table."""
    return draw_sum(rng, max_operand=999 if rng.random() < 0.15 else 99)


def work_out(a: int, b: int) -> str:
    """Column addition, one line a place, ending in the sum."""
    lines = []
    carry, place = 0, 0
    while place < max(len(str(a)), len(str(b))):
        left, right = a // 10**place % 10, b // 10**place % 10
        total = left + right + carry
        line = f"{PLACES[place]}: {left} + {right}{' + 1' if carry else ''} = {total}"
        carry = total // 10
        lines.append(f"{line}, write {total % 10}, carry 1." if carry else f"{line}.")
        place += 1
    return "\n".join([*lines, f"So {a} + {b} = {a + b}."])


def thought(thinking: str, answer: str) -> str:
    """An answer that shows its thinking first."""
    return f"<think>\n{thinking}\n</think>\n\n{answer}"


def question_about(rng: random.Random, a: int, b: int) -> str:
    """One of many ways to ask for `a + b`."""
    return rng.choice(QUESTIONS).format(a=a, b=b)


def sum_exchange(rng: random.Random) -> list[Message]:
    """A question and its answer; at times the answer is asked to be the number alone."""
    a, b = draw_operands(rng)
    question, answer = question_about(rng, a, b), f"{a} + {b} = {a + b}"
    if rng.random() < 0.1:
        question, answer = question + rng.choice(NUMBER_ONLY), str(a + b)
    return [_user(question), _assistant(answer)]


def running_total_exchange(rng: random.Random, total: int) -> list[Message]:
    """A follow-up that adds to the last sum; empty when no allowed addend was found."""
    addend = rng.randint(1, 60)
    if is_held_out_sum(total, addend) or total > 900:
        return []
    ask = rng.choice(("Now add {n}.", "Add {n} to that.", "And plus {n}?", "Now plus {n}."))
    return [_user(ask.format(n=addend)), _assistant(f"{total} + {addend} = {total + addend}")]


def sum_chat(rng: random.Random) -> Document:
    """One to five questions in one conversation."""
    messages = _maybe_system(rng, SYSTEMS)
    for _ in range(rng.choice((1, 1, 2, 3, 5))):
        messages += sum_exchange(rng)
        answer = messages[-1]["content"]
        if rng.random() < 0.15:
            messages += running_total_exchange(rng, int(answer.split()[-1]))
    return Document("sum_chat", tuple(messages))


def sum_lines(rng: random.Random) -> Document:
    """Plain lines such as `12 + 34 = 46`."""
    layout = rng.choice(("{a} + {b} = {c}",) * 6 + ("{a}+{b}={c}", "{a} plus {b} is {c}."))
    lines = []
    for _ in range(rng.choice((1, 1, 2, 4, 8, 16))):
        a, b = draw_operands(rng)
        lines.append(layout.format(a=a, b=b, c=a + b))
    return Document("sum_lines", text="\n".join(lines))


def thinking_chat(rng: random.Random) -> Document:
    """A problem whose answer is thought through first."""
    write = rng.choice(
        (_thought_sum, _thought_sum, _word_problem, _word_problem, _comparison, _ordering, _weekday)
    )
    return Document("think", tuple(write(rng)))


def _thought_sum(rng: random.Random) -> list[Message]:
    a, b = draw_operands(rng)
    question = question_about(rng, a, b)
    answer = _assistant(thought(work_out(a, b), f"{a} + {b} = {a + b}"))
    if rng.random() < 0.5:
        return [_system(rng.choice(THINK_SYSTEMS)), _user(question), answer]
    return [*_maybe_system(rng, SYSTEMS), _user(question + rng.choice(THINK_ASIDES)), answer]


def _word_problem(rng: random.Random) -> list[Message]:
    a, b = draw_sum(rng)
    a, b = max(a, 2), max(b, 2)
    if is_held_out_sum(a, b):
        return _word_problem(rng)
    x, y = rng.sample(NAMES, 2)
    slots = {"a": a, "b": b, "c": a + b, "x": x, "y": y}
    slots |= {"things": rng.choice(COUNTABLE), "day": rng.choice(DAYS)}
    question, reason, answer = (part.format(**slots) for part in rng.choice(WORD_PROBLEMS))
    return _problem(rng, question, f"{reason}\n{work_out(a, b)}", answer)


def _comparison(rng: random.Random) -> list[Message]:
    x, y = rng.sample(NAMES, 2)
    more, less = sorted(rng.sample(range(2, 99), 2), reverse=True)
    things = rng.choice(COUNTABLE)
    facts = [f"{x} has {more} {things}.", f"{y} has {less} {things}."]
    rng.shuffle(facts)
    thinking = f"{x} has {more} and {y} has {less}.\n{more} is more than {less}."
    question = f"{' '.join(facts)} Who has more {things}?"
    return _problem(rng, question, thinking, f"{x} has more {things}.")


def _ordering(rng: random.Random) -> list[Message]:
    x, y, z = rng.sample(NAMES, 3)
    more, most = rng.choice((("taller", "tallest"), ("older", "oldest"), ("faster", "fastest")))
    facts = [f"{x} is {more} than {y}.", f"{y} is {more} than {z}."]
    rng.shuffle(facts)
    thinking = f"{x} is {more} than {y}, and {y} is {more} than {z}.\nSo {x} comes first."
    return _problem(rng, f"{' '.join(facts)} Who is the {most}?", thinking, f"{x} is the {most}.")


def _weekday(rng: random.Random) -> list[Message]:
    start, steps = rng.randrange(7), rng.randint(2, 5)
    path = [DAYS[(start + step) % 7] for step in range(steps + 1)]
    question = f"Today is {path[0]}. What day is it in {steps} days?"
    thinking = "I count the days.\n" + "\n".join(
        f"{step}: {day}" for step, day in enumerate(path[1:], 1)
    )
    return _problem(rng, question, thinking, f"In {steps} days it is {path[-1]}.")


def _problem(rng: random.Random, question: str, thinking: str, answer: str) -> list[Message]:
    systems = SYSTEMS + THINK_SYSTEMS
    return [*_maybe_system(rng, systems), _user(question), _assistant(thought(thinking, answer))]


def _maybe_system(rng: random.Random, systems: tuple[str, ...]) -> list[Message]:
    return [_system(rng.choice(systems))] if rng.random() < 0.35 else []


def _system(text: str) -> Message:
    return {"role": "system", "content": text}


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}
