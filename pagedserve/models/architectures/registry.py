"""Which function reads which architecture. Filled by import, never changed after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pagedserve.spec import DecoderSpec

Builder = Callable[[dict[str, Any]], DecoderSpec]

ARCHITECTURES: dict[str, Builder] = {}


def arch(*names: str) -> Callable[[Builder], Builder]:
    """Register the decorated function for these class names of `config.json: architectures`."""

    def register(build: Builder) -> Builder:
        for name in names:
            assert name not in ARCHITECTURES, f"two specs for {name}"
            ARCHITECTURES[name] = build
        return build

    return register
