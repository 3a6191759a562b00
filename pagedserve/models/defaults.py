"""What a config.json leaves out because transformers has a default for it.

defaults.json holds these by `model_type`: of every family the values of keys that its spec reads.
`tests/models/test_defaults.py` makes it from the installed transformers, and compares.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_suffix(".json")


@functools.cache
def known() -> dict[str, dict[str, Any]]:
    """model_type → key → value."""
    found: dict[str, dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """`config` with the defaults of its `model_type` for the keys that it lacks."""
    kind = config.get("model_type")
    return {**known().get(kind, {}), **config} if isinstance(kind, str) else config
