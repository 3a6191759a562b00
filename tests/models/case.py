"""One tiny checkpoint of a family, as the parity suite describes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """`family`: transformers' model type. `config`: its tiny config, over `checkpoints.COMMON`.

    `attention`: transformers' implementation that is the witness, where the eager one is wrong.
    `architecture`: of config.json, where transformers writes the class that it makes of it.
    `context`: what `--max-model-len` says, for scalings that depend on it. `lengths`: of prompts.
    """

    family: str
    config: dict[str, Any] = field(default_factory=dict)
    context: int | None = None
    lengths: tuple[int, ...] = (37, 61)
    block_size: int = 5
    attention: str = "eager"
    architecture: str | None = None
