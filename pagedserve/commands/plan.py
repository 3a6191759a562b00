"""`pagedserve plan MODEL`: how a device's memory would be shared out, from config.json alone."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from pagedserve import config as flags
from pagedserve.commands.console import say
from pagedserve.config import Config
from pagedserve.errors import StartupError

if TYPE_CHECKING:
    from pagedserve.device import Outline
    from pagedserve.worker.memory import MemoryPlan

DRIVER_BYTES = 880 << 20  # of a GPU that its driver and our kernels take: measured on an H200


def add_flags(command: argparse.ArgumentParser) -> None:
    """What the command takes."""
    command.add_argument(
        "model_argument", nargs="?", metavar="MODEL", help="directory or hub id; --model also works"
    )
    command.add_argument(
        "--gpu-memory",
        type=float,
        default=None,
        metavar="GIB",
        help="plan for a GPU with so many GiB; the GPU found here, or else the CPU, if left out",
    )
    command.add_argument("--json", action="store_true", help="print JSON, for programs")
    flags.add_flags(command, groups=("model", "cache", "scheduler"))


def run(options: dict[str, Any]) -> int:
    """Print the plan; status 1 where the model does not fit. No weights are read or fetched."""
    size, as_json, model = (options.pop(n) for n in ("gpu_memory", "json", "model_argument"))
    if model is not None:
        if "model" in options:
            raise StartupError("give MODEL or --model, not both")
        options["model"] = model
    if size is not None and not 0 < size < 1 << 20:
        raise StartupError(f"--gpu-memory must be a number of GiB above 0, got {size:g}")
    config = Config.from_options(options)
    try:
        plan, device = planned(config, size)
    except StartupError as error:
        if not as_json:
            raise
        say(json.dumps({"fits": False, "error": error.message}, indent=2))
        return 1
    if as_json:
        say(json.dumps({"fits": True, "device": device.name, **plain(plan)}, indent=2))
        return 0
    for line in lines(plan, device):
        say(line)
    return 0


def planned(config: Config, size: float | None) -> tuple[MemoryPlan, Outline]:
    """By the arithmetic of a start, on a device of `size` GiB or on the one found here."""
    from pagedserve.models.hub import resolve
    from pagedserve.models.loading import load_configured
    from pagedserve.worker.start import plan_memory

    asked = config.model
    directory = resolve(asked.model, asked.revision, offline=asked.offline, weights=False)
    device = outline(asked.device, size)
    model = load_configured(asked, directory, device)
    device.take(model.weight_bytes)
    return plan_memory(config, device, model), device


def outline(wanted: str, size: float | None) -> Outline:
    """A device of `size` GiB, or as large as the one found here and as full."""
    from pagedserve.device import Memory, Outline, pick

    if size is not None:
        total = int(size * (1 << 30))
        free = max(0, total - DRIVER_BYTES)
        return Outline(Memory(free, total), is_gpu=True, name=f"a GPU of {size:g} GiB")
    found = pick(wanted)
    return Outline(found.memory(), is_gpu=found.is_gpu, name=found.name)


def lines(plan: MemoryPlan, device: Outline) -> list[str]:
    """The table, for people."""
    from pagedserve.worker.memory import shown

    limits = plan.limits
    texts = {
        "others": "taken already, and left by --gpu-memory-utilization",
        "weights": "",
        "rows": f"of {limits.max_num_seqs} sequences of {limits.max_model_len} tokens",
        "step": f"of {limits.max_num_batched_tokens} tokens",
        "graphs": "the same once more",
        "KV cache": f"{plan.num_blocks} blocks of {plan.block_size} tokens",
        "unused": "more than all sequences together can fill" if device.is_gpu else "",
    }
    if not device.is_gpu:
        texts["others"] = "taken already"
    table = [f"{shown(plan.total):>12}  {device.name}"]
    table += [
        f"{shown(size):>12}    {name:9} {texts[name]}".rstrip()
        for name, size in plan.items().items()
        if size
    ]
    per_token = plan.block_bytes / plan.block_size / 1024
    table += [
        "",
        f"a token takes {per_token:.4g} KiB of the KV cache, which holds {plan.num_tokens}",
        f"context {limits.max_model_len} tokens, {limits.max_num_seqs} sequences and "
        f"{limits.max_num_batched_tokens} tokens a step",
    ]
    return [*table, *plan.notes]


def plain(plan: MemoryPlan) -> dict[str, Any]:
    """The same for programs, in bytes."""
    limits = plan.limits
    return {
        "total_bytes": plan.total,
        "bytes": {name.lower().replace(" ", "_"): size for name, size in plan.items().items()},
        "kv_cache": {
            "block_size": plan.block_size,
            "block_bytes": plan.block_bytes,
            "bytes_per_token": plan.block_bytes / plan.block_size,
            "num_blocks": plan.num_blocks,
            "num_tokens": plan.num_tokens,
        },
        "max_model_len": limits.max_model_len,
        "max_num_seqs": limits.max_num_seqs,
        "max_num_batched_tokens": limits.max_num_batched_tokens,
        "notes": list(plan.notes),
    }
