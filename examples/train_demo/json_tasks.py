"""Writes requests for JSON: a schema, a sentence that holds the values, and the object that fits.

A record is drawn field by field from one domain; the set of its fields decides whether it may be
trained on or belongs to the bars.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import words
from chat_format import Document
from holdout import is_held_out

Schema = dict[str, Any]
Draw = Callable[[random.Random], tuple[Schema, Any]]


@dataclass(frozen=True, slots=True)
class Field:
    """A key, how its schema and value are drawn, and the clauses that say the value in English.

    In a clause, `{v}` is the value; a boolean has a pair of clauses, for true and for false.
    """

    key: str
    draw: Draw
    clauses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class JsonTask:
    """One request: the document that answers it, the schema, and the expected object.

    When `is_made_up`, the request names no values and any object that fits is as good.
    """

    document: Document
    schema: Schema
    expected: dict[str, Any]
    is_made_up: bool


def _string(draw: Callable[[random.Random], str]) -> Draw:
    return lambda rng: ({"type": "string"}, draw(rng))


def _choice(options: list[str]) -> Draw:
    return lambda rng: ({"type": "string"}, rng.choice(options))


def _enum(options: str) -> Draw:
    """An enum over some of the options, in a random order."""

    def draw(rng: random.Random) -> tuple[Schema, Any]:
        names = options.split()
        chosen = rng.sample(names, rng.randint(min(3, len(names)), len(names)))
        return {"type": "string", "enum": chosen}, rng.choice(chosen)

    return draw


def _integer(low: int, high: int) -> Draw:
    def draw(rng: random.Random) -> tuple[Schema, Any]:
        schema: Schema = {"type": "integer"}
        if rng.random() < 0.3:
            schema |= {"minimum": low} if rng.random() < 0.5 else {"minimum": low, "maximum": high}
        return schema, rng.randint(low, high)

    return draw


def _number(high: int) -> Draw:
    return lambda rng: ({"type": "number"}, rng.randint(1, high * 100 // 5) * 5 / 100)


def _boolean(rng: random.Random) -> tuple[Schema, Any]:
    return {"type": "boolean"}, rng.random() < 0.5


def _strings(options: list[str]) -> Draw:
    def draw(rng: random.Random) -> tuple[Schema, Any]:
        schema = {"type": "array", "items": {"type": "string"}}
        return schema, rng.sample(options, rng.choice((1, 2, 2, 3)))

    return draw


COLOR = _choice(words.COLORS)
DOMAINS: dict[str, tuple[Field, ...]] = {
    "person": (
        Field("name", _string(words.person), ("the name is {v}", "this is {v}", "meet {v}")),
        Field("age", _integer(1, 99), ("the age is {v}", "{v} years old", "aged {v}")),
        Field("city", _string(words.city), ("lives in {v}", "the city is {v}", "from {v}")),
        Field("job", _choice(words.JOBS), ("works as a {v}", "the job is {v}")),
        Field("favorite_color", COLOR, ("likes the color {v}", "the favorite color is {v}")),
        Field("pet", _choice(words.ANIMALS), ("has a {v}", "the pet is a {v}")),
        Field("food", _choice(words.FOODS), ("loves {v}", "likes to eat {v}")),
        Field("is_student", _boolean, ("is a student", "is not a student")),
        Field("hobbies", _strings(words.HOBBIES), ("enjoys {v}", "the hobbies are {v}")),
        Field("height_cm", _integer(80, 210), ("{v} cm tall", "the height is {v} cm")),
        Field("language", _choice(words.LANGUAGES), ("speaks {v}", "the language is {v}")),
    ),
    "product": (
        Field("product", _choice(words.PRODUCTS), ("the product is a {v}", "this is a {v}")),
        Field("price", _number(200), ("it costs {v}", "the price is {v}")),
        Field("quantity", _integer(0, 500), ("there are {v} of them", "the quantity is {v}")),
        Field("color", COLOR, ("it is {v}", "the color is {v}")),
        Field("size", _enum("small medium large tiny huge"), ("the size is {v}", "size {v}")),
        Field("in_stock", _boolean, ("it is in stock", "it is not in stock")),
        Field("rating", _integer(1, 5), ("it is rated {v}", "the rating is {v}")),
        Field(
            "brand",
            _string(lambda rng: words.made_up_word(rng).capitalize()),
            ("the brand is {v}", "it is made by {v}"),
        ),
        Field("code", _string(words.code), ("the code is {v}", "its code is {v}")),
    ),
    "book": (
        Field("title", _string(lambda rng: _title(rng)), ('the title is "{v}"', 'called "{v}"')),
        Field("author", _string(words.person), ("it was written by {v}", "the author is {v}")),
        Field("year", _integer(1900, 2030), ("it came out in {v}", "the year is {v}")),
        Field(
            "genre",
            _enum("fantasy mystery science history poetry travel adventure"),
            ("the genre is {v}", "it is a {v} book"),
        ),
        Field("pages", _integer(20, 900), ("it has {v} pages", "{v} pages long")),
        Field("language", _choice(words.LANGUAGES), ("it is in {v}", "the language is {v}")),
        Field("available", _boolean, ("it is available", "it is not available")),
    ),
    "event": (
        Field(
            "event",
            _enum("concert meeting party lecture workshop picnic dinner"),
            ("there is a {v}", "the event is a {v}"),
        ),
        Field("date", _string(words.date), ("it is on {v}", "the date is {v}")),
        Field("time", _string(words.clock_time), ("it starts at {v}", "the time is {v}")),
        Field("city", _string(words.city), ("it is in {v}", "the city is {v}")),
        Field("num_guests", _integer(2, 300), ("{v} guests will come", "for {v} guests")),
        Field("day", _choice(words.DAYS), ("it is on a {v}", "the day is {v}")),
        Field("is_free", _boolean, ("it is free", "it is not free")),
        Field("host", _string(words.person), ("the host is {v}", "{v} is the host")),
    ),
    "ticket": (
        Field("customer", _string(words.person), ("the customer is {v}", "{v} wrote to us")),
        Field(
            "priority",
            _enum("low normal high critical"),
            ("the priority is {v}", "this has {v} priority"),
        ),
        Field(
            "status",
            _enum("open closed pending waiting done"),
            ("the status is {v}", "the ticket is {v}"),
        ),
        Field("ticket_id", _string(words.code), ("the ticket is number {v}", "ticket {v}")),
        Field("urgent", _boolean, ("it is urgent", "it is not urgent")),
        Field("product", _choice(words.PRODUCTS), ("it is about a {v}", "the {v} is broken")),
        Field("days_open", _integer(0, 60), ("open for {v} days", "it waits for {v} days")),
    ),
    "weather": (
        Field("city", _string(words.city), ("the weather in {v}", "the city is {v}")),
        Field(
            "temperature",
            _integer(-20, 42),
            ("it is {v} degrees", "the temperature is {v} degrees"),
        ),
        Field(
            "condition",
            _enum("sunny cloudy rainy snowy windy foggy stormy"),
            ("it is {v} today", "the sky is {v}"),
        ),
        Field("humidity", _integer(5, 100), ("the humidity is {v} percent", "humidity {v}")),
        Field("day", _choice(words.DAYS), ("today is {v}", "on {v}")),
        Field("windy", _boolean, ("there is wind", "there is no wind")),
    ),
    "animal": (
        Field("name", _string(words.person), ("its name is {v}", "it is called {v}")),
        Field("species", _choice(words.ANIMALS), ("it is a {v}", "the animal is a {v}")),
        Field("age", _integer(1, 40), ("it is {v} years old", "the age is {v}")),
        Field("color", COLOR, ("it is {v}", "its color is {v}")),
        Field("friendly", _boolean, ("it is friendly", "it is not friendly")),
        Field("weight_kg", _integer(1, 900), ("it weighs {v} kg", "the weight is {v} kg")),
        Field("favorite_foods", _strings(words.FRUITS), ("it likes {v}", "it eats {v}")),
    ),
    "trip": (
        Field("from_city", _string(words.city), ("the trip starts in {v}", "from {v}")),
        Field("to_city", _string(words.city), ("it goes to {v}", "the trip ends in {v}")),
        Field("num_days", _integer(1, 30), ("it takes {v} days", "for {v} days")),
        Field("transport", _enum("train bus plane car boat bicycle"), ("by {v}", "we go by {v}")),
        Field("traveler", _string(words.person), ("{v} is going", "the traveler is {v}")),
        Field("month", _choice(words.MONTHS), ("it is in {v}", "the month is {v}")),
        Field("items", _strings(words.PRODUCTS), ("to pack: {v}", "we take {v}")),
        Field("return_trip", _boolean, ("it is a return trip", "it is one way")),
    ),
    "review": (
        Field("product", _choice(words.PRODUCTS), ("I bought a {v}", "this is about a {v}")),
        Field(
            "sentiment",
            _enum("positive negative neutral mixed"),
            ("my feeling is {v}", "the review is {v}"),
        ),
        Field("stars", _integer(1, 5), ("I give it {v} stars", "{v} stars")),
        Field("recommend", _boolean, ("I recommend it", "I do not recommend it")),
        Field("reviewer", _string(words.person), ("written by {v}", "the reviewer is {v}")),
    ),
}
INSTRUCTIONS = (
    "Answer with JSON that fits this schema:",
    "Reply only with JSON that matches this schema:",
    "Return a JSON object for this schema:",
    "You turn text into JSON. The schema is:",
    "Use this JSON schema for your answer:",
    "Give only valid JSON. Schema:",
)
MAKE_UP = (
    "Make up {noun}.",
    "Invent {noun}.",
    "Give me {noun}.",
    "Give an example of {noun}.",
    "Describe {noun}.",
    "Create {noun}.",
)


def json_task(rng: random.Random, *, held_out: bool = False) -> JsonTask:
    """A request for JSON over a set of fields that training sees (or only the bars see)."""
    while True:
        domain, fields = _draw_fields(rng)
        if is_held_out("json", domain, *sorted(field.key for field in fields)) == held_out:
            break
    drawn = {field.key: field.draw(rng) for field in fields}
    schema = _schema(rng, domain, {key: part for key, (part, _) in drawn.items()})
    expected = {key: value for key, (_, value) in drawn.items()}
    is_made_up = rng.random() < 0.2
    if is_made_up:
        request = rng.choice(MAKE_UP).format(noun=words.with_article(domain))
    else:
        request = _sentence(rng, fields, expected)
    messages = _ask(rng, request, schema)
    answer = {"role": "assistant", "content": json.dumps(expected, ensure_ascii=False)}
    return JsonTask(Document("json", (*messages, answer)), schema, expected, is_made_up)


def _title(rng: random.Random) -> str:
    noun = rng.choice(words.PRODUCTS + words.ANIMALS + words.NOUNS).capitalize()
    return rng.choice(
        (
            f"The {rng.choice(words.QUALITIES).capitalize()} {noun}",
            f"The {noun} of {rng.choice(words.CITIES)}",
            f"{rng.choice(words.NAMES)} and the {noun}",
        )
    )


def _draw_fields(rng: random.Random) -> tuple[str, list[Field]]:
    if rng.random() < 0.2:
        return "record", _invented_fields(rng)
    domain = rng.choice(list(DOMAINS))
    fields = DOMAINS[domain]
    return domain, rng.sample(fields, min(rng.choice((1, 2, 2, 3, 3, 4, 4, 5, 6)), len(fields)))


def _invented_fields(rng: random.Random) -> list[Field]:
    """Fields named by two words, so that keys are read from the schema and not remembered."""
    keys = {
        f"{rng.choice(words.QUALITIES + words.NOUNS)}_{rng.choice(words.NOUNS)}"
        for _ in range(rng.randint(1, 5))
    }
    draws = (
        _integer(0, 999),
        _string(words.code),
        _string(words.person),
        COLOR,
        _boolean,
        _string(words.city),
        _enum("one two three four five"),
        _enum("yes no maybe never"),
        _strings(words.COLORS),
        _number(50),
        _choice(words.DAYS),
    )
    fields = []
    for key in sorted(keys):
        draw, label = rng.choice(draws), key.replace("_", " ")
        clauses = (f"the {label} is {{v}}", f"{label}: {{v}}", f"{{v}} is the {label}")
        if draw is _boolean:
            clauses = (f"the {label} is true", f"the {label} is false")
        fields.append(Field(key, draw, clauses))
    rng.shuffle(fields)
    return fields


def _schema(rng: random.Random, domain: str, properties: dict[str, Schema]) -> Schema:
    schema: Schema = {"type": "object", "properties": properties}
    if rng.random() < 0.1:
        schema = {"title": domain.capitalize(), **schema}
    if rng.random() < 0.9:
        schema["required"] = list(properties)
    if rng.random() < 0.4:
        schema["additionalProperties"] = False
    return schema


def _sentence(rng: random.Random, fields: list[Field], values: dict[str, Any]) -> str:
    """Every value said once, in any order."""
    clauses = [_clause(rng, field, values[field.key]) for field in fields]
    rng.shuffle(clauses)
    joiner = rng.choice((". ", ", ", ", ", " and "))
    if joiner == ". ":
        return ". ".join(clause[0].upper() + clause[1:] for clause in clauses) + "."
    if len(clauses) > 1 and joiner == ", ":
        text = ", ".join(clauses[:-1]) + rng.choice((", and ", ", ", " and ")) + clauses[-1]
    else:
        text = joiner.join(clauses)
    return text[0].upper() + text[1:] + "."


def _clause(rng: random.Random, field: Field, value: Any) -> str:
    if isinstance(value, bool):
        return field.clauses[0 if value else 1]
    if isinstance(value, list):
        value = " and ".join([", ".join(value[:-1]), value[-1]] if value[1:] else value)
    return rng.choice(field.clauses).format(v=value)


def _ask(rng: random.Random, request: str, schema: Schema) -> list[dict[str, str]]:
    """The schema and the request, laid out in one of several ways."""
    shown = _show(rng, schema)
    instruction = rng.choice(INSTRUCTIONS)
    layout = rng.random()
    if layout < 0.5:
        system = f"{instruction}{rng.choice((chr(10), ' '))}{shown}"
        if rng.random() < 0.2:
            system = f"You are a helpful assistant.\n{system}"
        return [{"role": "system", "content": system}, {"role": "user", "content": request}]
    if layout < 0.7:
        user = f"{request}\n\n{instruction} {shown}"
    elif layout < 0.85:
        user = f"{instruction}\n{shown}\n\n{request}"
    else:
        ask = rng.choice(("Extract the values as JSON.", "Turn this into JSON.", "Answer in JSON."))
        user = f"{ask}\nSchema: {shown}\nText: {request}"
    system = [{"role": "system", "content": "You are a helpful assistant."}]
    return [*(system if rng.random() < 0.3 else []), {"role": "user", "content": user}]


def _show(rng: random.Random, schema: Schema) -> str:
    style = rng.random()
    if style < 0.75:
        return json.dumps(schema)
    return json.dumps(schema, indent=2) if style < 0.85 else json.dumps(schema, separators=",:")
