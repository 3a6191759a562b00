"""Writes conversations with tools: signatures in the system turn, calls, results, answers.

Half of the functions are named ones with a real answer; the other half is invented from a verb, a
noun and typed arguments, so that names and arguments are read from the signature.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from string import Formatter
from typing import Any

import words
from chat_format import Document, Message
from holdout import draw_sum, is_held_out
from words import word_list

Arguments = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Parameter:
    """An argument of a function: its schema, and how a value for it is drawn."""

    name: str
    schema: dict[str, Any]
    draw: Callable[[random.Random], Any]
    required: bool = True


@dataclass(frozen=True, slots=True)
class Tool:
    """A function, what a user says to want it, what it returns and how the result is told.

    `requests` and `answer` are format strings over the arguments and, for `answer`, the result.
    """

    name: str
    description: str
    parameters: tuple[Parameter, ...]
    requests: tuple[str, ...]
    result: Callable[[random.Random, Arguments], dict[str, Any]]
    answer: str

    def signature(self) -> dict[str, Any]:
        """The function as the OpenAI API lists it."""
        parameters = {
            "type": "object",
            "properties": {p.name: p.schema for p in self.parameters},
            "required": [p.name for p in self.parameters if p.required],
        }
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolTask:
    """A conversation that ends at its first call, the tools on offer, and the expected calls."""

    document: Document
    signatures: tuple[dict[str, Any], ...]
    expected: tuple[dict[str, Any], ...]


def _string(name: str, draw: Callable[[random.Random], str], about: str = "") -> Parameter:
    described = {"description": about} if about else {}
    return Parameter(name, {"type": "string", **described}, draw)


def _choice(name: str, options: list[str]) -> Parameter:
    return Parameter(name, {"type": "string"}, lambda rng: rng.choice(options))


def _enum(name: str, options: str, *, required: bool = True) -> Parameter:
    names = options.split()
    schema = {"type": "string", "enum": names}
    return Parameter(name, schema, lambda rng: rng.choice(names), required)


def _integer(name: str, low: int, high: int) -> Parameter:
    return Parameter(name, {"type": "integer"}, lambda rng: rng.randint(low, high))


def _done(rng: random.Random, arguments: Arguments) -> dict[str, Any]:
    return {"status": "ok"}


def _weather(rng: random.Random, arguments: Arguments) -> dict[str, Any]:
    sky = rng.choice(("sunny", "cloudy", "rainy", "snowy", "windy", "foggy"))
    return {"temperature": rng.randint(-10, 38), "condition": sky}


CITY = _string("city", words.city, "The name of the city")
TOPICS = [
    f"{head} {tail}"
    for head in ("best", "cheap", "easy", "new", "old", "famous")
    for tail in ("recipes", "museums", "hotels", "books", "games", "songs", "gardens")
]
SUBJECTS = word_list("hello meeting lunch birthday holiday invoice project party lesson news")
TOOLS = (
    Tool(
        "get_weather",
        "Get the current weather in a city.",
        (CITY,),
        (
            "What is the weather in {city}?",
            "How is the weather in {city}?",
            "What's the weather like in {city}?",
            "Tell me the weather in {city}.",
            "Is it raining in {city}?",
            "What is the weather like in {city} today?",
            "Weather in {city}?",
            "How warm is it in {city}?",
        ),
        _weather,
        "It is {condition} in {city}, with {temperature} degrees.",
    ),
    Tool(
        "get_weather",
        "Get the weather for a city.",
        (CITY, _enum("unit", "celsius fahrenheit", required=False)),
        (
            "What is the weather in {city} in {unit}?",
            "Weather in {city}, in {unit}, please.",
            "How warm is it in {city} in {unit}?",
            "What is the weather in {city}?",
            "How is the weather in {city}?",
            "What's the weather like in {city}?",
        ),
        _weather,
        "It is {condition} in {city}, with {temperature} degrees.",
    ),
    Tool(
        "get_current_weather",
        "Get the current weather in a given location.",
        (_string("location", words.city, "The city"),),
        (
            "What is the weather in {location}?",
            "What's the weather like in {location}?",
            "How is the weather in {location} now?",
        ),
        _weather,
        "It is {condition} in {location}, with {temperature} degrees.",
    ),
    Tool(
        "get_time",
        "Get the local time in a city.",
        (CITY,),
        ("What time is it in {city}?", "Tell me the time in {city}.", "Time in {city}?"),
        lambda rng, arguments: {"time": words.clock_time(rng)},
        "It is {time} in {city}.",
    ),
    Tool(
        "send_email",
        "Send an email to a person.",
        (_string("to", words.person, "Who gets it"), _choice("subject", SUBJECTS)),
        (
            "Send an email to {to} about {subject}.",
            "Write {to} an email about {subject}.",
            "Email {to} with the subject {subject}.",
        ),
        _done,
        "I sent the email to {to}.",
    ),
    Tool(
        "search_web",
        "Search the web.",
        (_choice("query", TOPICS),),
        ("Search the web for {query}.", "Look up {query}.", "Find {query} on the web."),
        lambda rng, arguments: {"num_results": rng.randint(3, 90)},
        "I found {num_results} results for {query}.",
    ),
    Tool(
        "set_alarm",
        "Set an alarm at a time of day.",
        (_string("time", words.clock_time),),
        ("Set an alarm for {time}.", "Wake me up at {time}.", "I need an alarm at {time}."),
        _done,
        "The alarm is set for {time}.",
    ),
    Tool(
        "set_timer",
        "Start a timer.",
        (_integer("minutes", 1, 90),),
        ("Set a timer for {minutes} minutes.", "Start a timer of {minutes} minutes."),
        _done,
        "The timer runs for {minutes} minutes.",
    ),
    Tool(
        "convert_currency",
        "Convert an amount of money.",
        (
            _integer("amount", 1, 900),
            _enum("from_currency", "USD EUR GBP JPY CHF"),
            _enum("to_currency", "USD EUR GBP JPY CHF"),
        ),
        (
            "Convert {amount} {from_currency} to {to_currency}.",
            "How much is {amount} {from_currency} in {to_currency}?",
        ),
        lambda rng, arguments: {"converted": rng.randint(1, 999)},
        "{amount} {from_currency} is {converted} {to_currency}.",
    ),
    Tool(
        "play_music",
        "Play a song.",
        (_string("artist", words.person), _choice("genre", word_list("jazz rock pop folk soul"))),
        ("Play some {genre} by {artist}.", "I want to hear {genre} from {artist}."),
        _done,
        "I am playing {genre} by {artist}.",
    ),
    Tool(
        "translate_text",
        "Translate a word.",
        (
            _choice("text", words.ANIMALS + words.FRUITS + words.FOODS),
            _choice("target_language", words.LANGUAGES),
        ),
        ("Translate {text} into {target_language}.", "How do you say {text} in {target_language}?"),
        lambda rng, arguments: {"translation": words.made_up_word(rng)},
        "In {target_language} it is {translation}.",
    ),
    Tool(
        "get_stock_price",
        "Get the price of a stock.",
        (_string("symbol", lambda rng: "".join(rng.choices("ABCDEFGHKLMNPRST", k=4))),),
        ("What is the stock price of {symbol}?", "How much is {symbol} stock?"),
        lambda rng, arguments: {"price": rng.randint(2, 900)},
        "{symbol} costs {price}.",
    ),
    Tool(
        "book_table",
        "Book a table in a restaurant.",
        (
            _string("restaurant", lambda rng: words.made_up_word(rng).capitalize()),
            _integer("people", 1, 12),
            _string("time", words.clock_time),
        ),
        (
            "Book a table at {restaurant} for {people} people at {time}.",
            "I need a table for {people} at {restaurant}, at {time}.",
        ),
        _done,
        "Your table at {restaurant} is booked for {time}.",
    ),
    Tool(
        "set_light",
        "Turn the light in a room on or off.",
        (_choice("room", words.ROOMS), _enum("state", "on off")),
        ("Turn {state} the light in the {room}.", "Switch the {room} light {state}."),
        _done,
        "The light in the {room} is {state}.",
    ),
    Tool(
        "add_numbers",
        "Add two numbers.",
        (_integer("a", 0, 99), _integer("b", 0, 99)),
        ("Add {a} and {b}.", "What is {a} + {b}?", "What is {a} plus {b}?"),
        lambda rng, arguments: {"result": arguments["a"] + arguments["b"]},
        "{a} + {b} = {result}",
    ),
    Tool(
        "create_event",
        "Put an event into the calendar.",
        (
            _choice("title", word_list("lunch dinner party meeting concert lesson picnic")),
            _string("date", words.date),
        ),
        ("Put a {title} into my calendar on {date}.", "Create an event {title} on {date}."),
        _done,
        "The {title} is in your calendar on {date}.",
    ),
    Tool(
        "find_flights",
        "Find flights between two cities.",
        (_string("origin", words.city), _string("destination", words.city)),
        (
            "Find flights from {origin} to {destination}.",
            "I want to fly from {origin} to {destination}.",
        ),
        lambda rng, arguments: {"num_flights": rng.randint(1, 20)},
        "There are {num_flights} flights from {origin} to {destination}.",
    ),
    Tool(
        "get_capital",
        "Get the capital of a country.",
        (_choice("country", word_list("France Italy Spain Japan Kenya Peru Norway Egypt Canada")),),
        ("Use the tool to find the capital of {country}.", "Look up the capital of {country}."),
        lambda rng, arguments: {"capital": words.made_up_word(rng).capitalize()},
        "The capital of {country} is {capital}.",
    ),
)
PLAIN_TURNS = (
    ("Hello!", "Hello! How can I help you?"),
    ("Hi there", "Hello! How can I help you?"),
    ("Thank you!", "You are welcome!"),
    ("Who are you?", "I am the pagedserve demo model, a very small language model."),
    ("What can you do?", "I can talk a little, and I can call the functions that you give me."),
    ("Goodbye!", "Goodbye! Have a nice day!"),
)
SYSTEMS = (
    "You are a helpful assistant.",
    "You are a helpful assistant with tools.",
    "Use the tools when they help.",
    "You are a friendly assistant.",
)


def tool_task(rng: random.Random, *, held_out: bool = False) -> ToolTask:
    """A request that one of the tools answers, over values or names that only one side sees."""
    tool, arguments = _draw_request(rng, held_out=held_out)
    tools = _offer(rng, tool)
    several = [arguments]
    if rng.random() < 0.1:
        several += [a for a in [_second(rng, tool, arguments)] if a and not held_out]
    expected = tuple({"name": tool.name, "arguments": a} for a in several)
    request = " ".join(_request(rng, tool, a) for a in several)
    shown = tuple(_describe(rng, other) for other in tools)
    messages = [*_maybe_system(rng), _user(request), _calls(expected)]
    return ToolTask(Document("tool", tuple(messages), shown), shown, expected)


def tool_chat(rng: random.Random) -> Document:
    """A conversation with tools on offer: calls with their results, and turns that need none."""
    if rng.random() < 0.12:
        return _plain_chat(rng)
    tool, arguments = _draw_request(rng)
    shown = tuple(_describe(rng, other) for other in _offer(rng, tool))
    messages = _maybe_system(rng)
    if rng.random() < 0.15:
        messages += _plain_turn(rng)
    messages += _exchange(rng, tool, arguments)
    if rng.random() < 0.25:
        messages += _plain_turn(rng) if rng.random() < 0.3 else _again(rng, tool, arguments)
    return Document("tool", tuple(messages), shown)


def _exchange(rng: random.Random, tool: Tool, arguments: Arguments) -> list[Message]:
    """Request, call, result, answer; at times two calls at once."""
    several = [arguments]
    if rng.random() < 0.12:
        several += [a for a in [_second(rng, tool, arguments)] if a]
    messages = [_user(" ".join(_request(rng, tool, a) for a in several))]
    messages.append(_calls(tuple({"name": tool.name, "arguments": a} for a in several)))
    results = [tool.result(rng, a) for a in several]
    messages += [{"role": "tool", "content": json.dumps(result)} for result in results]
    said = [_fill(tool.answer, a | r) for a, r in zip(several, results, strict=True)]
    return [*messages, {"role": "assistant", "content": " ".join(said)}]


def _again(rng: random.Random, tool: Tool, arguments: Arguments) -> list[Message]:
    other = _second(rng, tool, arguments)
    return _exchange(rng, tool, other) if other else []


def _plain_chat(rng: random.Random) -> Document:
    tools = _offer(rng, rng.choice(TOOLS))
    shown = tuple(_describe(rng, tool) for tool in tools)
    return Document("tool", tuple(_maybe_system(rng) + _plain_turn(rng)), shown)


def _plain_turn(rng: random.Random) -> list[Message]:
    user, assistant = rng.choice(PLAIN_TURNS)
    return [_user(user), {"role": "assistant", "content": assistant}]


def _draw_request(rng: random.Random, *, held_out: bool = False) -> tuple[Tool, Arguments]:
    while True:
        tool = _invented_tool(rng) if rng.random() < 0.5 else rng.choice(TOOLS)
        arguments = _draw_arguments(rng, tool)
        if _is_held_out(tool, arguments) == held_out:
            return tool, arguments


def _is_held_out(tool: Tool, arguments: Arguments) -> bool:
    """Named tools are held out by their first value, invented ones by their name."""
    if tool in TOOLS:
        return is_held_out("tool", tool.name, next(iter(arguments.values())))
    return is_held_out("tool", tool.name)


def _draw_arguments(rng: random.Random, tool: Tool) -> Arguments:
    if tool.name == "add_numbers":
        return dict(zip("ab", draw_sum(rng), strict=True))
    given = [p for p in tool.parameters if p.required or rng.random() < 0.5]
    return {p.name: p.draw(rng) for p in given}


def _second(rng: random.Random, tool: Tool, arguments: Arguments) -> Arguments | None:
    other = _draw_arguments(rng, tool)
    return None if other == arguments or _is_held_out(tool, other) else other


def _offer(rng: random.Random, tool: Tool) -> list[Tool]:
    """The tool among up to three others, each name once."""
    offered = {tool.name: tool}
    for _ in range(rng.choice((0, 0, 1, 1, 2, 3))):
        other = _invented_tool(rng) if rng.random() < 0.5 else rng.choice(TOOLS)
        if other.name not in offered and _apart(tool, other):
            offered[other.name] = other
    tools = list(offered.values())
    rng.shuffle(tools)
    return tools


def _apart(tool: Tool, other: Tool) -> bool:
    """False for two tools that answer the same question, where the choice would be a guess."""
    return not ("weather" in tool.name and "weather" in other.name)


def _invented_tool(rng: random.Random) -> Tool:
    verb, noun = rng.choice(words.VERBS), rng.choice(words.NOUNS)
    if rng.random() < 0.3:
        noun = f"{rng.choice(words.QUALITIES)}_{noun}"
    said = noun.replace("_", " ")
    kinds = rng.sample(_INVENTED, rng.choice((1, 1, 2, 2, 3)))
    parameters = tuple(make(name) for name, make in kinds)
    pieces = [
        rng.choice(_MENTIONS).format(label=p.name.replace("_", " "), slot=f"{{{p.name}}}")
        for p in parameters
    ]
    tail = ", ".join(pieces[:-1]) + (" and " if pieces[1:] else "") + pieces[-1]
    requests = tuple(lead.format(verb=verb, noun=said) + f" with {tail}." for lead in _LEADS)
    description = f"{verb.capitalize()} {words.with_article(said)}."
    answer = f"Done, I used {verb}_{noun}. The status is {{status}}."
    return Tool(f"{verb}_{noun}", description, parameters, requests, _status, answer)


def _status(rng: random.Random, arguments: Arguments) -> dict[str, Any]:
    return {"status": rng.choice(("ok", "done", "pending", "closed", "active"))}


_LEADS = (
    "{verb} the {noun}",
    "Please {verb} the {noun}",
    "Can you {verb} the {noun}",
    "I want to {verb} the {noun}",
)
_MENTIONS = ("{label} {slot}", "{label} {slot}", "the {label} {slot}")
_INVENTED: tuple[tuple[str, Callable[[str], Parameter]], ...] = (
    ("id", lambda name: _string(name, words.code)),
    ("code", lambda name: _string(name, words.code)),
    ("name", lambda name: _string(name, words.person)),
    ("owner", lambda name: _string(name, words.person)),
    ("city", lambda name: _string(name, words.city)),
    ("color", lambda name: _choice(name, words.COLORS)),
    ("count", lambda name: _integer(name, 1, 999)),
    ("limit", lambda name: _integer(name, 1, 50)),
    ("page", lambda name: _integer(name, 1, 99)),
    ("date", lambda name: _string(name, words.date)),
    ("time", lambda name: _string(name, words.clock_time)),
    ("day", lambda name: _choice(name, words.DAYS)),
    ("room", lambda name: _choice(name, words.ROOMS)),
    ("size", lambda name: _enum(name, "small medium large")),
    ("priority", lambda name: _enum(name, "low normal high")),
    ("urgent", lambda name: Parameter(name, {"type": "boolean"}, lambda rng: rng.random() < 0.5)),
    (
        "tags",
        lambda name: Parameter(
            name,
            {"type": "array", "items": {"type": "string"}},
            lambda rng: rng.sample(words.COLORS + words.FRUITS, 2),
        ),
    ),
)


def _request(rng: random.Random, tool: Tool, arguments: Arguments) -> str:
    """A way to ask that says every argument, and no argument that is not given."""
    requests = [r for r in tool.requests if _slots(r) == arguments.keys()]
    text = _fill(rng.choice(requests), arguments)
    return text[0].upper() + text[1:] if rng.random() < 0.9 else text[0].lower() + text[1:]


@lru_cache(maxsize=4096)
def _slots(template: str) -> frozenset[str]:
    return frozenset(name for _, name, _, _ in Formatter().parse(template) if name)


def _fill(template: str, values: Arguments) -> str:
    return template.format(**{key: _said(value) for key, value in values.items()})


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return " and ".join(value) if isinstance(value, list) else str(value)


def _describe(rng: random.Random, tool: Tool) -> dict[str, Any]:
    """The signature; at times without its description, as terse clients send it."""
    signature = tool.signature()
    if rng.random() < 0.1:
        del signature["function"]["description"]
    return signature


def _calls(calls: tuple[dict[str, Any], ...]) -> Message:
    listed = [{"type": "function", "function": call} for call in calls]
    return {"role": "assistant", "content": "", "tool_calls": listed}


def _maybe_system(rng: random.Random) -> list[Message]:
    system = {"role": "system", "content": rng.choice(SYSTEMS)}
    return [system] if rng.random() < 0.4 else []


def _user(text: str) -> Message:
    return {"role": "user", "content": text}
