"""A model directory around a shape: its config.json, and a tokenizer in which every id has text.

A server streams text. Of real vocabularies some ids write half a character, which a stream holds
back; here every id is a word in plain letters, so that every token is a piece of its own.
"""

from __future__ import annotations

import json
from pathlib import Path

SHAPES = Path(__file__).parent / "shapes"


def shape_directory(name: str) -> Path:
    """One of `shapes`, or a directory of yours with a config.json."""
    found = SHAPES / name if (SHAPES / name).is_dir() else Path(name)
    if not (found / "config.json").is_file():
        known = ", ".join(sorted(each.name for each in SHAPES.iterdir()))
        raise SystemExit(f"there is no shape {name}; there are {known}, or give a directory")
    return found


def write_checkpoint(shape: Path, directory: Path) -> Path:
    """`directory` with the shape's config.json and a tokenizer of its vocabulary's size."""
    config = json.loads((shape / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config))
    vocab = {f"Ġw{id}": id for id in range(config["vocab_size"])}
    side = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": side,
        "decoder": side,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer_config.json").write_text("{}")
    return directory
