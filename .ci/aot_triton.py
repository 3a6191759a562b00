"""Compile every Triton kernel ahead of time for the GPUs we name, on a machine without one.

    .venv/bin/python .ci/aot_triton.py [--only WORD] [--out DIR]

A kernel's variants are the list `AOT` of its module in pagedserve/kernels (see `aot.Variant`). Each
is compiled for every capability from its oldest on, and ptxas's result is read with the cuobjdump
that Triton brings: registers, stack bytes (what spilled), shared memory, instructions. Exits 1
where a variant spills more than it says, asks for more shared memory than that GPU gives a block,
or lacks an instruction that it was written for. --out keeps cubins and PTX.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from pagedserve.kernels.aot import Variant  # noqa: E402

# Compute capability → bytes of shared memory that a block can have (CUDA programming guide).
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
SHOWN = ("HGMMA", "HMMA", "UTMALDG", "LDGSTS", "LDL", "STL", "ACQBULK", "PREEXIT", "USETMAXREG")


def variants() -> dict[tuple[str, int], Variant]:
    """Every variant by its module and place in the module's list."""
    found = {}
    for path in sorted((ROOT / "pagedserve/kernels").glob("*.py")):
        if re.search(r"^AOT\b", path.read_text(), re.MULTILINE):
            module = f"pagedserve.kernels.{path.stem}"
            for at, variant in enumerate(importlib.import_module(module).AOT):
                found[module, at] = variant
    return found


def source(variant: Variant) -> ASTSource:
    """Its types, constants and what is known of alignment, as Triton wants them."""
    names = variant.kernel.arg_names
    constants = dict(variant.constants)
    constants.update({name: None for name, kind in variant.types.items() if kind is None})
    missing = [n for n in names if n not in constants and n not in variant.types]
    unknown = [n for n in (*variant.types, *variant.constants) if n not in names]
    assert not missing and not unknown, f"{variant.label}: missing {missing}, unknown {unknown}"
    signature = {n: "constexpr" if n in constants else variant.types[n] for n in names}
    where = {name: (at,) for at, name in enumerate(names)}
    aligned = {
        where[n]: [["tt.divisibility", 16]]
        for n, kind in signature.items()
        if kind.startswith(("*", "i")) and n not in variant.unaligned
    }
    make = GluonASTSource if variant.gluon else ASTSource
    return make(variant.kernel, signature, {where[n]: v for n, v in constants.items()}, aligned)


def options(variant: Variant) -> dict[str, int]:
    """Compile options, those that the variant leaves to the compiler left out."""
    chosen = {"num_warps": variant.num_warps}
    if not variant.gluon:
        chosen["num_stages"] = variant.num_stages
    if variant.maxnreg is not None:
        chosen["maxnreg"] = variant.maxnreg
    return chosen


def check(job: tuple[str, int, int, str]) -> tuple[str, list[str]]:
    """(line to print, what is wrong) of one variant on one capability."""
    module, at, capability, out = job
    variant = importlib.import_module(module).AOT[at]
    name = f"sm_{capability} {variant.label}"
    try:
        kernel = triton.compile(
            source(variant), target=GPUTarget("cuda", capability, 32), options=options(variant)
        )
    except Exception as error:  # whatever the compiler raises is this variant's failure
        return name, [f"does not compile: {type(error).__name__}: {error}"]
    path = Path(out) / (re.sub(r"\W+", "_", name) + ".cubin")
    path.write_bytes(kernel.asm["cubin"])
    path.with_suffix(".ptx").write_text(kernel.asm["ptx"])
    usage = re.search(r"REG:(\d+) STACK:(\d+)", dump("-res-usage", path))
    assert usage is not None, f"{name}: cuobjdump names no registers"
    registers, stack = map(int, usage.groups())
    sass = dump("--dump-sass", path)
    count = Counter({op: len(re.findall(rf"\b{re.escape(op)}\b", sass)) for op in SHOWN})
    shared = kernel.metadata.shared
    wrong = [f"no {op}" for op in variant.sass if not re.search(rf"\b{re.escape(op)}\b", sass)]
    if stack > variant.stack * (1 if capability >= 90 else 2):
        wrong.append(f"{stack} stack bytes")
    if shared > SHARED_MEMORY[capability]:
        wrong.append(f"{shared} bytes of shared memory, of {SHARED_MEMORY[capability]}")
    shown = ", ".join(f"{op} {n}" for op, n in count.items() if n)
    return f"{name}: {registers} registers, stack {stack}, shared {shared}, {shown}", wrong


def dump(flag: str, path: Path) -> str:
    """What cuobjdump says of a cubin."""
    command = [str(CUOBJDUMP), flag, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> int:
    """Compile all, a process a core. The exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="variants whose label has this in it")
    parser.add_argument("--out", help="folder to keep cubins and PTX in")
    args = parser.parse_args()
    print("triton", triton.__version__)
    with contextlib.ExitStack() as stack:
        out = args.out or stack.enter_context(tempfile.TemporaryDirectory())
        Path(out).mkdir(parents=True, exist_ok=True)
        jobs = [
            (module, at, capability, out)
            for (module, at), variant in variants().items()
            for capability in SHARED_MEMORY
            if variant.capability <= capability <= (variant.newest or capability)
            and args.only in variant.label
        ]
        pool = stack.enter_context(multiprocessing.Pool(os.cpu_count()))
        failed = 0
        for line, wrong in pool.imap(check, jobs):
            failed += bool(wrong)
            print(f"FAIL {line}  <- {'; '.join(wrong)}" if wrong else f"ok   {line}", flush=True)
    print(f"{len(jobs)} compilations, {failed} failed")
    return 1 if failed or not jobs else 0


if __name__ == "__main__":
    sys.exit(main())
