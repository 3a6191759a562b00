"""The kernels of `csrc/` as libraries: compiled at first use or ahead, kept on disk, loaded.

    CPU     c++ -march=native    compiled when it is first asked for
    CUDA    nvcc, for sm_90a     compiled ahead (`pagedserve build-kernels`) or behind a start

They are never required. Without a compiler, or where one fails, one line of log says so, and every
op is computed otherwise.

A library is kept under a name made of what it depends on: the sources, the flags, the processor,
and the compiler. It appears under that name complete or not at all, so that processes which compile
it at the same time do not disturb each other. Where there is no compiler, what another one made of
the same sources serves: an image may be built with one and run without.
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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pagedserve import config

log = logging.getLogger("pagedserve")

PACKAGE = Path(__file__).parents[1]
SOURCES = (PACKAGE / "csrc", PACKAGE.parent / "csrc")  # in a wheel, in a checkout
COMPILE_SECONDS = 300
LOADING = threading.Lock()


class Unavailable(Exception):
    """Why there is no library."""


class NoCompiler(Unavailable):
    """None on the path."""


def processor() -> str:
    """Its model and what it can do, which is what -march=native compiles for."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one library is made of `csrc/`.

    name, runs_on: what people call it, and what it is for; prefix: of its file; sources: which
    files; compilers: those that can, best first; flags: of compiling and of linking; target: what
    else the result depends on.
    """

    name: str
    runs_on: str
    prefix: str
    sources: str
    compilers: tuple[str, ...]
    flags: tuple[str, ...]
    target: Callable[[], str]


CPU = Recipe(
    name="C++ kernels",
    runs_on="this processor",
    prefix="cpu",
    sources="*_cpu.cpp",
    compilers=("c++", "g++", "clang++"),
    flags=(
        *("-std=gnu++17", "-O3", "-march=native", "-ffp-contract=fast"),
        *("-fPIC", "-pthread", "-Wno-psabi"),
    ),
    target=processor,
)
CUDA = Recipe(
    name="CUDA kernels",
    runs_on="GPUs of capability 9.0 (sm_90a)",
    prefix="cuda-sm_90a",
    sources="*_cuda.cu",
    compilers=("nvcc",),
    flags=(
        *("-std=c++17", "-O3", "-Xcompiler", "-fPIC"),
        "-gencode=arch=compute_90a,code=sm_90a",
    ),
    target=platform.machine,
)


def load() -> ctypes.CDLL | None:
    """The CPU's library, compiled if need be; None where there is none, or none is wanted.

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
        return ctypes.CDLL(str(shared_library(CPU, config.kernel_directories())))
    except (Unavailable, OSError) as reason:
        log.warning("no C++ kernels, torch computes instead (slower): %s", reason)
        return None


def shared_library(recipe: Recipe, directories: Sequence[Path]) -> Path:
    """The library in one of `directories`, compiled into the last if it is in none.

    Raises Unavailable or OSError.
    """
    if path := find(recipe, directories):
        return path
    compiler = find_compiler(recipe)
    directory = directories[-1]
    path = directory / file_name(recipe, compiler)
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    log.info("compiling %s with %s into %s", recipe.name, compiler, path)
    compile_into(path, recipe, compiler)
    return path


def find(recipe: Recipe, directories: Sequence[Path]) -> Path | None:
    """The library where it is there already. Raises Unavailable where there are no sources."""
    try:
        wanted = file_name(recipe, find_compiler(recipe))
    except NoCompiler:  # any other's is good
        wanted = file_name(recipe, None)
    found = (path for directory in directories for path in sorted(directory.glob(wanted)))
    return next(found, None)


def compile_into(path: Path, recipe: Recipe, compiler: str) -> None:
    """Compile each source by itself, all at the same time, and link."""
    sources, _ = source_files(recipe)
    with tempfile.TemporaryDirectory(dir=path.parent) as workshop:
        objects = [f"{workshop}/{source.stem}.o" for source in sources]
        commands = [
            [compiler, *recipe.flags, "-c", str(source), "-o", made]
            for source, made in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(len(commands)) as pool:
            list(pool.map(run, commands))
        unfinished = f"{workshop}/{path.name}"
        run([compiler, *recipe.flags, "-shared", *objects, "-o", unfinished])
        os.replace(unfinished, path)


def source_files(recipe: Recipe) -> tuple[list[Path], list[Path]]:
    """The recipe's files, and headers."""
    for directory in SOURCES:
        if found := sorted(directory.glob(recipe.sources)):
            return found, sorted(directory.glob("*.h"))
    raise Unavailable(f"no {recipe.sources} in {' or '.join(map(str, SOURCES))}")


def find_compiler(recipe: Recipe) -> str:
    """The first of the recipe's compilers on the path."""
    for name in recipe.compilers:
        if path := shutil.which(name):
            return path
    names = ", ".join(recipe.compilers)
    raise NoCompiler(f"no compiler for {recipe.name} on the path ({names})")


def file_name(recipe: Recipe, compiler: str | None) -> str:
    """Equal for what would compile to the same library; None: a pattern for any compiler's."""
    sources, headers = source_files(recipe)
    texts = [file.read_text() for file in (*sources, *headers)]
    made_of = digest([*recipe.flags, recipe.target(), *texts])
    made_by = "*" if compiler is None else digest([run([compiler, "--version"])])
    return f"{recipe.prefix}-{made_of}-{made_by}.so"


def digest(parts: Sequence[str]) -> str:
    """Of texts, in order."""
    known = hashlib.sha256()
    for part in parts:
        known.update(part.encode() + b"\0")
    return known.hexdigest()[:16]


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
