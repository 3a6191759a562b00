"""`pagedserve build-kernels`: compile the C++ and CUDA kernels ahead, as an image's build does."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from pagedserve import config
from pagedserve.commands.console import say
from pagedserve.errors import StartupError
from pagedserve.kernels import extension
from pagedserve.kernels.extension import Recipe

OTHERWISE = {
    "cpu": "torch computes instead, several times slower",
    "cuda": "Triton's kernels serve instead; nvcc comes with the CUDA toolkit",
}


def add_flags(command: argparse.ArgumentParser) -> None:
    """What the command takes."""
    command.add_argument(
        "kinds",
        nargs="*",
        metavar="KIND",
        help=f"{' or '.join(OTHERWISE)}; left out: each that there is a compiler for",
    )
    command.add_argument(
        "--out",
        type=Path,
        default=None,
        metavar="DIR",
        help="where they go, for PAGEDSERVE_KERNELS_DIR; left out: the cache, where a start looks",
    )


def run(options: dict[str, Any]) -> int:
    """Build what is not built yet, and say for what and where. 1 where nothing could be built."""
    asked: list[str] = options["kinds"]
    if unknown := [kind for kind in asked if kind not in OTHERWISE]:
        raise StartupError(f"no kernels of kind {unknown[0]!r}; there are {', '.join(OTHERWISE)}")
    out: Path | None = options["out"]
    directory = out.absolute() if out is not None else config.kernel_directories()[-1]
    recipes = {"cpu": extension.CPU, "cuda": extension.CUDA}
    built = [
        build(recipes[kind], directory, otherwise=OTHERWISE[kind], needed=kind in asked)
        for kind in asked or recipes
    ]
    if out is not None and any(built):
        say(f"to use them, start the server with PAGEDSERVE_KERNELS_DIR={directory}")
    return 0 if any(built) else 1


def build(recipe: Recipe, directory: Path, *, otherwise: str, needed: bool) -> bool:
    """Whether it is there now. Raises StartupError where it fails, or is `needed` and cannot be."""
    began = time.monotonic()
    try:
        there = extension.find(recipe, [directory]) is not None
        path = extension.shared_library(recipe, [directory])
    except extension.NoCompiler as reason:
        if needed:
            raise StartupError(f"{reason}; {otherwise}") from reason
        say(f"{recipe.name}: not built: {reason}; {otherwise}")
        return False
    except (extension.Unavailable, OSError) as reason:
        raise StartupError(f"{recipe.name} cannot be built: {reason}") from reason
    how = "there already" if there else f"{time.monotonic() - began:.1f} s"
    say(f"{recipe.name} for {recipe.runs_on}: {path} ({how})")
    return True
