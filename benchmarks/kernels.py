"""Kernels on one GPU, timed as CUDA graph replays: microseconds, and the share of the roofline.

    python benchmarks/kernels.py [PART …] [--quick] [--sweep] [--out FILE]

Parts: attention, products, small, sampler, mixture; none is all.

Prints a table to stderr and one JSON line. --sweep also times other constants than the kernels
choose; --quick takes the first case of each table. Needs torch, triton and an NVIDIA GPU only.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

PARTS = {  # name → module beside this one, with `run`
    "attention": "_attention",
    "products": "_products",
    "small": "_small",
    "sampler": "_sampler",
    "mixture": "_mixture",
}


def main() -> None:
    import torch
    import triton

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; none is all")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--out", help="also write the JSON line to this file")
    args = parser.parse_args()
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        raise SystemExit("kernels.py: needs an NVIDIA GPU")
    found = {
        "benchmark": "kernels",
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "seed": 0,
    }
    torch.manual_seed(0)
    for name in args.parts or PARTS:
        found[name] = importlib.import_module(PARTS[name]).run(quick=args.quick, sweep=args.sweep)
    line = json.dumps(found)
    print(line)
    if args.out:
        Path(args.out).write_text(line + "\n")


if __name__ == "__main__":
    main()
