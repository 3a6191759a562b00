"""`pagedserve models`: which architectures can be served, how, and what was tested."""

from __future__ import annotations

import argparse
import json
from typing import Any

from pagedserve.commands.console import say
from pagedserve.models import catalog


def add_flags(command: argparse.ArgumentParser) -> None:
    """What the command takes."""
    command.add_argument("--json", action="store_true", help="print JSON, for programs")


def run(options: dict[str, Any]) -> int:
    """Print the catalogue."""
    found = catalog.read()
    if options["json"]:
        say(json.dumps(catalog.plain(found), indent=2, ensure_ascii=False))
        return 0
    for line in lines(found):
        say(line)
    return 0


def lines(found: catalog.Catalog) -> list[str]:
    """For people: one a family, then one a class."""
    shown = [f"native, {len(found.natives)} families: our own decoder"]
    for each in found.natives:
        name, *more = each.names
        count = "1 config" if each.configs == 1 else f"{each.configs} configs"
        tested = f"{each.oracle}, {count}" if each.oracle else "no test of its own"
        shown.append(f"  {name:34} {tested}" + (f"; also {', '.join(more)}" if more else ""))
    equal = found.with_result("equal")
    shown.append("")
    shown.append(f"through transformers {found.transformers}, {len(equal)} classes: logits equal")
    shown += [f"  {each.name:34} relative error {each.detail}" for each in equal]
    shown.append("")
    shown.append("not tried, the start decides")
    shown += [f"  {each.name:34} {each.detail}" for each in found.with_result("unbuilt")]
    shown.append("")
    shown.append("refused")
    shown += [f"  {each.name:34} {each.detail}" for each in found.with_result("refused")]
    return shown
