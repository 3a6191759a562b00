"""`pagedserve convert MODEL`: from pickled weights to safetensors, once."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pagedserve.commands.console import say


def add_flags(command: argparse.ArgumentParser) -> None:
    """What the command takes."""
    command.add_argument(
        "model", metavar="MODEL", help="directory, or hub id pulled with --include-bin"
    )
    command.add_argument("--revision", default=None, help="branch, tag or commit of a hub model")
    command.add_argument(
        "--out",
        default=None,
        metavar="DIR",
        help="where to write; beside the originals if left out",
    )


def run(options: dict[str, Any]) -> int:
    """Convert; the originals stay as they are."""
    from pagedserve.models.convert import convert
    from pagedserve.models.hub import pulled

    directory = pulled(options["model"], options["revision"])
    out = None if options["out"] is None else Path(options["out"]).expanduser()
    convert(directory, out, say)
    say(f"next: pagedserve serve {out or options['model']}")
    return 0
