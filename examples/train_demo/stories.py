"""Writes short stories from the plots in `plots.txt`: a cast, then a way to tell each part."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import words
from chat_format import Document
from words import phrase_list

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiouAEIOU])")

OPENINGS = ("Once upon a time, there [was|lived]",) * 5 + (
    "Long ago, there [was|lived]",
    "Many years ago, there [was|lived]",
    "There once [was|lived]",
)
PLACES = phrase_list(
    """forest|village|valley|meadow|town|farm|castle|garden|harbor|island|mountain village|
river town|little house|old mill|lighthouse|wooden hut"""
)
LANDMARKS = phrase_list(
    """old bridge|tall oak tree|deep well|stone tower|blue lake|quiet beach|dark cave|long river|
round hill|empty mill|market square|apple orchard"""
)
TREASURES = phrase_list(
    """golden key|silver bell|red kite|blue scarf|wooden boat|small lantern|shiny coin|music box|
glass marble|warm hat|brass whistle|magic seed|paper star|copper ring|old map|
green umbrella|little drum|woolen blanket"""
)
ADJECTIVES = phrase_list(
    """kind|brave|shy|clever|cheerful|curious|gentle|quiet|honest|patient|lonely|young|small|
careful|proud|friendly|sleepy|hungry"""
)
TREATS = phrase_list("warm bread|honey cake|apple pie|hot soup|sweet berries|fresh milk|plum jam")
WEATHER = phrase_list("sunny|rainy|windy|cold|warm|foggy|snowy|bright|gray|stormy|cloudy|mild")
SKILLS = phrase_list(
    """swim|whistle|paint|dance|climb|sing|bake bread|ride a horse|play the flute|sail a boat|
read the stars|build a kite|grow flowers"""
)


@dataclass(frozen=True, slots=True)
class Plot:
    """A title, and for each paragraph the ways to tell it.

    In a way `{name}` is a slot of the cast and `[this|that]` a choice; choices nest.
    """

    title: str
    paragraphs: tuple[tuple[str, ...], ...]


PLOTS_FILE = Path(__file__).with_name("plots.txt")
ENDINGS = (
    "",
    "",
    "",
    "[And they lived happily ever after.|The end.]",
    "[And that is the story of {hero}.|And so the day ended well for everyone.]",
)
REQUESTS = (
    "Tell me a story.",
    "Tell me a short story.",
    "Write a short story.",
    "Can you tell me a story?",
    "Tell me a bedtime story, please.",
    "Please write a story.",
    "I want to hear a story.",
)
REQUESTS_ABOUT = (
    "Tell me a story about a {kind}.",
    "Write a short story about a {kind}.",
    "Write a story about a {kind} named {hero}.",
    "Tell me a story about a {kind} called {hero}.",
    "Can you tell me a story about a {kind}?",
    "Tell me a story about a {kind} and a {friendkind}.",
    "I want a story about {hero} the {kind}.",
    "Once upon a time story about a {kind}, please.",
)


@lru_cache(maxsize=1)
def read_plots() -> tuple[Plot, ...]:
    """The plots of the file; the first holds the opening paragraph of them all."""
    _, *sections = PLOTS_FILE.read_text(encoding="utf-8").split("\n# ")
    return tuple(map(_read_plot, sections))


def _read_plot(section: str) -> Plot:
    title, *groups = section.strip().split("\n\n")
    ways = (group.removeprefix("- ").split("\n- ") for group in groups)
    return Plot(title, tuple(tuple(" ".join(way.split()) for way in group) for group in ways))


def story(rng: random.Random) -> Document:
    """A story as plain text, at times under its title."""
    title, text = tell(rng, draw_cast(rng))
    return Document("story", text=f"{title}\n\n{text}" if rng.random() < 0.1 else text)


def story_chat(rng: random.Random) -> Document:
    """A user asks for a story, at times about someone, and gets it."""
    cast = draw_cast(rng)
    request = expand(rng, rng.choice(REQUESTS + REQUESTS_ABOUT * 2), cast)
    messages = [
        {"role": "user", "content": request},
        {"role": "assistant", "content": tell(rng, cast)[1]},
    ]
    return Document("story_chat", tuple(messages))


def draw_cast(rng: random.Random) -> dict[str, str]:
    """Everyone and everything in a story, by slot."""
    girl = rng.random() < 0.5
    hero = rng.choice(words.GIRLS if girl else words.BOYS)
    adjectives = rng.sample(ADJECTIVES, 3)
    person = ("girl", "girl", "woman") if girl else ("boy", "boy", "man")
    kind = rng.choice(words.ANIMALS if rng.random() < 0.6 else person)
    cast = {
        "opening": rng.choice(OPENINGS),
        "hero": hero,
        "kind": kind,
        "friend": rng.choice([name for name in words.NAMES if name != hero]),
        "friendkind": rng.choice([animal for animal in words.ANIMALS if animal != kind]),
        "he": "she" if girl else "he",
        "him": "her" if girl else "him",
        "his": "her" if girl else "his",
        "he_said_other": "said the stranger",
        "place": rng.choice(PLACES),
        "landmark": rng.choice(LANDMARKS),
        "treasure": rng.choice(TREASURES),
        "treat": rng.choice(TREATS),
        "skill": rng.choice(SKILLS),
        "adj": adjectives[0],
        "adj2": adjectives[1],
        "adj3": adjectives[2],
    }
    for slot in ("he", "his", "treasure", "skill"):
        cast[slot.capitalize()] = cast[slot].title() if len(slot) > 3 else cast[slot].capitalize()
    return cast


def tell(rng: random.Random, cast: dict[str, str]) -> tuple[str, str]:
    """A title and a story of five paragraphs, or at times fewer."""
    opening, *plots = read_plots()
    plot = rng.choice(plots)
    ways = [*opening.paragraphs, *plot.paragraphs]
    paragraphs = [expand(rng, rng.choice(way), cast) for way in ways]
    ending = expand(rng, rng.choice(ENDINGS), cast)
    paragraphs[-1] = f"{paragraphs[-1]} {ending}".rstrip()
    return expand(rng, plot.title, cast), "\n\n".join(paragraphs)


def expand(rng: random.Random, template: str, cast: dict[str, str]) -> str:
    """The template with every choice taken and every slot filled."""
    text = template.replace("{opening}", cast["opening"])
    while _CHOICE.search(text):
        text = _CHOICE.sub(lambda match: rng.choice(match[1].split("|")), text)
    while "{weather}" in text:
        text = text.replace("{weather}", rng.choice(WEATHER), 1)
    return _ARTICLE.sub(r"\1n ", text.format(**cast))
