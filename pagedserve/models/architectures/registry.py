"""Which function reads which architecture. Filled by import, never changed after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pagedserve.errors import StartupError
from pagedserve.spec import DecoderSpec

Config = dict[str, Any]
Builder = Callable[[Config], DecoderSpec]


@dataclass(frozen=True, slots=True)
class Family:
    """One function and the class names it reads; the first is the one that is shown.

    `may_be_null`: sizes that its config.json may give as null, besides those of every family.
    """

    build: Builder
    classes: tuple[str, ...]
    may_be_null: frozenset[str] = frozenset()


ARCHITECTURES: dict[str, Family] = {}  # class name → its family


def arch(*names: str, may_be_null: tuple[str, ...] = ()) -> Callable[[Builder], Builder]:
    """Register the decorated function for these class names of `config.json: architectures`."""

    def register(build: Builder) -> Builder:
        family = Family(build, names, frozenset(may_be_null))
        for name in names:
            assert name not in ARCHITECTURES, f"two specs for {name}"
            ARCHITECTURES[name] = family
        return build

    return register


def refuse(c: Config, *options: str) -> None:
    """Raise StartupError for the first of `options` that is set: it would change the answers."""
    for option in options:
        if c.get(option):
            raise StartupError(f"config.json: {option} {c[option]!r} is not supported")
