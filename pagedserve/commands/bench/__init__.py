"""`pagedserve bench throughput | latency | serve | startup`: how fast it is, on your machine.

    throughput   the engine without HTTP: many requests at once, tokens a second
    latency      the engine without HTTP: one batch, seconds to its end
    serve        any OpenAI-compatible server over HTTP: TTFT, TPOT, ITL, tokens a second
    startup      seconds from starting a server to its first answer, and to readiness

A table for people, or one JSON line with versions, GPU and seed. Failed requests are counted and
shown, and make the exit status 1. docs/performance.md says what each figure means.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from pagedserve.commands.bench import flags

COMMANDS = {  # name → module beside this one with `run_NAME`, flags, help
    "throughput": ("offline", flags.throughput, "tokens a second of the engine, without HTTP"),
    "latency": ("offline", flags.latency, "seconds that one batch takes, without HTTP"),
    "serve": ("online", flags.serve, "load a running OpenAI-compatible server"),
    "startup": ("startup", flags.startup, "seconds until a server answers, and until it is ready"),
}


def add_flags(command: argparse.ArgumentParser) -> None:
    """What the command takes."""
    several = command.add_subparsers(required=True, metavar="WHAT", dest="benchmark")
    for name, (_, add, text) in COMMANDS.items():
        add(several.add_parser(name, help=text, description=text))


def run(options: dict[str, Any]) -> int:
    """Run one; the exit status is 1 if anything failed."""
    name = options.pop("benchmark")
    module = importlib.import_module(f"{__name__}.{COMMANDS[name][0]}")
    return int(getattr(module, f"run_{name}")(options))
