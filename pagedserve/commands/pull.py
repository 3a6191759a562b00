"""`pagedserve pull MODEL`: bring a hub model into the local cache, and say how far it is."""

from __future__ import annotations

import argparse
from typing import Any

from pagedserve.commands.console import Console


def add_flags(command: argparse.ArgumentParser) -> None:
    """What the command takes."""
    command.add_argument("model", metavar="MODEL", help="hub id, such as org/name")
    command.add_argument("--revision", default=None, help="branch, tag or commit (default: main)")
    command.add_argument(
        "--include-bin",
        action="store_true",
        help="get pickled weights (.bin, .pt) where there are no others, for `pagedserve convert`",
    )


def run(options: dict[str, Any]) -> int:
    """Pull; a second pull fetches only what is missing or new."""
    from pagedserve.models import hub

    console, model, revision = Console(), options["model"], options["revision"]

    def report(phase: str, detail: str, done: int = 0, total: int = 0) -> None:
        console(f"\r{phase} {detail}")

    try:
        directory = hub.pull(model, revision, pickles=options["include_bin"], on_progress=report)
    finally:
        console.end()
    command = f"pagedserve serve {model}" + (f" --revision {revision}" if revision else "")
    if lacks := hub.missing(directory):
        command = f"pagedserve convert {model}" + (f" --revision {revision}" if revision else "")
        console(f"{model} has pickled weights only; they are not read as they are ({lacks[0]})")
    console(f"{model} is in {directory}\nnext: {command}")
    return 0
