"""The C++ kernels as a library: compiled at first use, kept on disk, loaded.

They are never required. Without a compiler, or where one fails, `load` says so in one line of log
and returns None, and every op is computed by torch.

A library is kept under a name made of what it depends on: the sources, the flags, the compiler and
the processor. It appears under that name complete or not at all, so that processes which compile it
at the same time do not disturb each other.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pagedserve import config

log = logging.getLogger("pagedserve")

PACKAGE = Path(__file__).parents[1]
SOURCES = (PACKAGE / "csrc", PACKAGE.parent / "csrc")  # in a wheel, in a checkout
COMPILERS = ("c++", "g++", "clang++")
OPTIMISE = ("-std=gnu++17", "-O3", "-march=native", "-ffp-contract=fast")
FLAGS = (*OPTIMISE, "-fPIC", "-pthread", "-Wno-psabi")
COMPILE_SECONDS = 300
LOADING = threading.Lock()


class Unavailable(Exception):
    """Why there is no library."""


def load() -> ctypes.CDLL | None:
    """The library, compiled if need be; None where there is none to be had, or none is wanted.

    Threads that ask at the same time wait for one and the same.
    """
    with LOADING:
        return load_once()


@functools.cache
def load_once() -> ctypes.CDLL | None:
    """See `load`."""
    if not config.cpu_kernels_wanted():
        return None
    try:
        return ctypes.CDLL(str(library(config.cache_directory() / "kernels")))
    except (Unavailable, OSError) as reason:
        log.warning("no C++ kernels, torch computes instead (slower): %s", reason)
        return None


def library(directory: Path) -> Path:
    """The compiled library in `directory`. Raises Unavailable or OSError."""
    sources, headers = source_files()
    compiler = find_compiler()
    path = directory / f"cpu-{key(compiler, [*sources, *headers])}.so"
    if path.exists():
        return path
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    log.info("compiling C++ kernels with %s into %s", compiler, path)
    with tempfile.TemporaryDirectory(dir=directory) as workshop:
        objects = [f"{workshop}/{source.stem}.o" for source in sources]
        commands = [
            [compiler, *FLAGS, "-c", str(source), "-o", made]
            for source, made in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(len(commands)) as pool:
            list(pool.map(run, commands))
        unfinished = f"{workshop}/{path.name}"
        run([compiler, *FLAGS, "-shared", *objects, "-o", unfinished])
        os.replace(unfinished, path)
    return path


def source_files() -> tuple[list[Path], list[Path]]:
    """C++ files and headers."""
    for directory in SOURCES:
        if found := sorted(directory.glob("*_cpu.cpp")):
            return found, sorted(directory.glob("*.h"))
    raise Unavailable(f"no sources in {' or '.join(map(str, SOURCES))}")


def find_compiler() -> str:
    """The first compiler on the path."""
    for name in COMPILERS:
        if path := shutil.which(name):
            return path
    raise Unavailable(f"no C++ compiler on the path ({', '.join(COMPILERS)})")


def key(compiler: str, files: list[Path]) -> str:
    """Equal for what would compile to the same library on this processor."""
    known = hashlib.sha256()
    parts = [run([compiler, "--version"]), *FLAGS, processor(), *(f.read_text() for f in files)]
    for part in parts:
        known.update(part.encode() + b"\0")
    return known.hexdigest()[:20]


def processor() -> str:
    """Its model and what it can do, which is what -march=native compiles for."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def run(command: list[str]) -> str:
    """Its output. Raises Unavailable with the first line of what it complained about."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]}: {error}") from error
    if done.returncode:
        complaint = next((line for line in done.stderr.splitlines() if "error" in line), "")
        raise Unavailable(f"{command[0]} ended with {done.returncode}: {complaint}")
    return done.stdout
