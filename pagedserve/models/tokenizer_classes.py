"""What no file of a checkpoint says of its tokenizer, by `tokenizer_class`: a table read from TOML.

It lies with the architectures because it names them; the room that reads tokenizers knows none.
"""

from __future__ import annotations

import functools
import tomllib
from pathlib import Path
from typing import Any

TABLE = Path(__file__).parent / "architectures" / "tokenizer_classes.toml"


@functools.cache
def tokenizer_classes() -> dict[str, dict[str, Any]]:
    """Settings by class name; see `text.formats` for the keys."""
    return tomllib.loads(TABLE.read_text(encoding="utf-8"))
