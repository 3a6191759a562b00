"""A whole checkpoint onto a GPU: seconds and GB/s, ours and the safetensors library's; equality.

    python benchmarks/load_model.py --shape llama-3.1-8b [--runs 3] [--dir /dev/shm]

Writes the shape's checkpoint, full of random bytes, into a new folder of --dir, which warms the
page cache. Each run builds the model from it. `safe_open` is the library's own way onto the GPU,
tensor by tensor. Then tensors in their own dtype are compared with the library's to the bit, and
some of them cast, turned and by rows with the same done by torch; the exit status is 1 where any
differs.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from _checkpoint import shape_directory
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pagedserve.commands.bench import machine
from pagedserve.device import Device, pick
from pagedserve.models import config_json, loading
from pagedserve.models.architectures import spec_of
from pagedserve.models.assembly import assemble
from pagedserve.models.loading import load_model, weights
from pagedserve.models.weights import Dummy
from pagedserve.spec import DecoderSpec

SHARD_BYTES = 4 << 30
SWEPT = ((4, 4), (8, 2), (8, 8), (12, 4), (16, 2), (16, 4))
CHANGED = 12  # tensors that are compared cast, turned and by rows


class Asked(Dummy):
    """Notes what is asked for; fills nothing."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}

    def read(
        self,
        name: str,
        into: Tensor,
        *,
        transposed: bool = False,
        rows: Tensor | None = None,
        later: bool = False,
    ) -> None:
        assert rows is None and not transposed, "a shape whose tensors are stored as they are kept"
        self.shapes[name] = tuple(into.shape)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dir", default=None)
    parser.add_argument("--sweep", action="store_true", help="other rings too: threads x MiB")
    args = parser.parse_args()
    device = pick("cuda")
    with tempfile.TemporaryDirectory(dir=args.dir) as place:
        directory = Path(place)
        spec, num_bytes = written(shape_directory(args.shape), directory, device)
        ours = [loaded(directory, device) for _ in range(args.runs)]
        others = {f"{n}x{m}": swept(directory, device, n, m) for n, m in SWEPT if args.sweep}
        theirs = [through_library(directory) for _ in range(args.runs)]
        different = differing(directory, spec, device)
    gigabytes = num_bytes / 1e9
    line = {
        "benchmark": "load_model",
        "model": args.shape,
        "gigabytes": round(gigabytes, 2),
        "seconds": [round(each, 3) for each in ours],
        "gigabytes_per_s": [round(gigabytes / each, 1) for each in ours],
        "swept_gigabytes_per_s": {
            name: round(gigabytes / each, 1) for name, each in others.items()
        },
        "safe_open_seconds": [round(each, 3) for each in theirs],
        "safe_open_gigabytes_per_s": [round(gigabytes / each, 1) for each in theirs],
        "different": different,
        "gpu": machine.gpu_name(),
        **machine.versions(),
    }
    print(json.dumps(line))
    return 1 if different else 0


def written(shape: Path, directory: Path, device: Device) -> tuple[DecoderSpec, int]:
    """Write config.json and shards of random bytes; their number."""
    (directory / "config.json").write_text((shape / "config.json").read_text())
    spec = spec_of(config_json.complete(config_json.plain(directory, None)))
    asked = Asked()
    assemble(spec, asked, device=device, dtype=torch.bfloat16)
    shards: list[dict[str, Tensor]] = [{}]
    sizes = [0]
    for name, wanted in sorted(asked.shapes.items()):
        if sizes[-1] > SHARD_BYTES:
            shards.append({})
            sizes.append(0)
        random_bits = torch.randint(-(1 << 15), 1 << 15, wanted, dtype=torch.int16, device="cuda")
        shards[-1][name] = random_bits.view(torch.bfloat16).cpu()
        sizes[-1] += shards[-1][name].nbytes
    places = {}
    for at, tensors in enumerate(shards):
        file = f"model-{at + 1:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, directory / file)
        places |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.cuda.empty_cache()
    return spec, sum(sizes)


def loaded(directory: Path, device: Device) -> float:
    """Seconds until every weight is on the GPU."""
    began = time.perf_counter()
    model = load_model(directory, device=device)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    del model
    torch.cuda.empty_cache()
    return seconds


def swept(directory: Path, device: Device, threads: int, mebibytes: int) -> float:
    """The best of two with another ring."""
    usual = loading.Ring
    loading.Ring = functools.partial(  # type: ignore[misc, assignment]
        usual, threads=threads, buffers=2 * threads, buffer_bytes=mebibytes << 20
    )
    try:
        return min(loaded(directory, device) for _ in range(2))
    finally:
        loading.Ring = usual  # type: ignore[misc]


def through_library(directory: Path) -> float:
    """The same by the safetensors library."""
    began, kept = time.perf_counter(), []
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(str(path), "pt", device="cuda") as file:
            kept += [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    kept.clear()
    torch.cuda.empty_cache()
    return seconds


def differing(directory: Path, spec: DecoderSpec, device: Device) -> list[str]:
    """Names of tensors that do not come as they are stored, cast, turned or picked."""
    source = weights(directory, spec, "auto", 0, device, lambda detail: None, None)
    found = []
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(str(path), "pt", device="cuda") as file:
            names = sorted(file.keys())
            changed = set(random.sample(names, min(CHANGED, len(names))))
            for name in names:
                stored = file.get_tensor(name)
                into = torch.empty_like(stored)
                source.read(name, into)
                same = torch.equal(into.view(torch.int16), stored.view(torch.int16))
                if name in changed:
                    same = same and all(changes_alike(source, name, stored))
                if not same:
                    found.append(name)
    source.finish()
    return found


def changes_alike(source: object, name: str, stored: Tensor) -> list[bool]:
    """Whether it is right as float32, by rows in any order, and turned."""
    read = source.read  # type: ignore[attr-defined]
    wide = torch.empty_like(stored, dtype=torch.float32)
    read(name, wide)
    rows = torch.randperm(stored.shape[0])[: stored.shape[0] // 3 + 1]
    picked = torch.empty_like(stored[: len(rows)])
    read(name, picked, rows=rows)
    alike = [
        torch.equal(wide.view(torch.int32), stored.float().view(torch.int32)),
        torch.equal(picked.view(torch.int16), stored[rows.cuda()].view(torch.int16)),
    ]
    if stored.dim() == 2:
        turned = torch.empty_like(stored.t().contiguous())
        read(name, turned, transposed=True)
        alike.append(
            torch.equal(turned.view(torch.int16), stored.t().contiguous().view(torch.int16))
        )
    return alike


if __name__ == "__main__":
    sys.exit(main())
