"""Reading weights: seconds and peak memory, ours against the safetensors library's `safe_open`.

Writes a file of random matrices, then reads it in fresh processes, taking turns, from a page cache
that the writing has warmed; each copies every tensor into memory of its own in the wanted dtype, on
one thread. Reported is the best of the runs, by the clock and in seconds of the processor, and the
peak of resident memory over what was resident before, in MiB, beside the size of what is kept.

    python benchmarks/load_weights.py [--mb 1024] [--runs 5] [--dir DIR]
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from pagedserve.version import __version__

CASES = (("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32"))
ROWS, COLUMNS = 2048, 4096

READ = """
import sys, time, torch
from pathlib import Path
torch.set_num_threads(1)
how, directory, dtype = sys.argv[1], Path(sys.argv[2]), getattr(torch, sys.argv[3])

def resident(field):
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) >> 10

if how == "ours":
    from pagedserve.models.weights import Checkpoint
    from pagedserve.spec import DecoderSpec, Norm
else:
    from safetensors import safe_open
before, kept = resident("VmRSS"), []
begun, busy = time.perf_counter(), time.process_time()
if how == "ours":
    spec = DecoderSpec(1, 1, 1, (), Norm(), {})
    source = Checkpoint(directory, spec, lambda phase: None)
    for name in list(source.tensors):
        kept.append(torch.empty(source.shape(name), dtype=dtype))
        source.read(name, kept[-1])
    source.finish()
else:
    file = safe_open(str(directory / "model.safetensors"), "pt")
    for name in file.keys():
        tensor = file.get_tensor(name)
        kept.append(torch.empty(tensor.shape, dtype=dtype))
        kept[-1].copy_(tensor)
wall, cpu = time.perf_counter() - begun, time.process_time() - busy
print(wall, cpu, resident("VmHWM") - before, sum(t.nbytes for t in kept) >> 20)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mb", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dir", default=None)
    args = parser.parse_args()
    figures = {}
    for stored, wanted in CASES:
        with tempfile.TemporaryDirectory(dir=args.dir) as directory:
            dtype: torch.dtype = getattr(torch, stored)
            count = max(1, (args.mb << 20) // (ROWS * COLUMNS * dtype.itemsize))
            tensors = {f"t{i}": torch.randn(ROWS, COLUMNS).to(dtype) for i in range(count)}
            save_file(tensors, Path(directory) / "model.safetensors")
            del tensors
            runs: dict[str, list[list[float]]] = {"ours": [], "safe_open": []}
            for _ in range(args.runs):
                for how, found in runs.items():
                    command = [sys.executable, "-c", READ, how, directory, wanted]
                    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                    found.append([float(word) for word in run.stdout.split()])
        figures[f"{stored} to {wanted}"] = {
            how: {
                "seconds": round(min(run[0] for run in found), 3),
                "cpu_seconds": round(min(run[1] for run in found), 3),
                "peak_mib": max(run[2] for run in found),
                "weights_mib": found[0][3],
            }
            for how, found in runs.items()
        }
    print(
        json.dumps(
            {
                "benchmark": "load_weights",
                "figures": figures,
                "mb": args.mb,
                "runs": args.runs,
                "pagedserve": __version__,
                "torch": torch.__version__,
                "machine": platform.machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
