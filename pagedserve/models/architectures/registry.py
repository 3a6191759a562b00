"""Which function reads which architecture. Filled by import, never changed after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pagedserve.spec import DecoderSpec

Config = dict[str, Any]
Builder = Callable[[Config], DecoderSpec]


@dataclass(frozen=True, slots=True)
class Family:
    """One function and the class names it reads; the first is the one that is shown."""

    build: Builder
    classes: tuple[str, ...]


ARCHITECTURES: dict[str, Family] = {}  # class name → its family


def arch(*names: str) -> Callable[[Builder], Builder]:
    """Register the decorated function for these class names of `config.json: architectures`."""

    def register(build: Builder) -> Builder:
        family = Family(build, names)
        for name in names:
            assert name not in ARCHITECTURES, f"two specs for {name}"
            ARCHITECTURES[name] = family
        return build

    return register
