"""`pagedserve tune MODEL`: find the fastest kernels for a model's matrices on this GPU, once."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from pagedserve.commands.console import say
from pagedserve.errors import StartupError

if TYPE_CHECKING:
    from pagedserve.device import Cuda
    from pagedserve.models.loading import LoadedModel

ROWS = (1, 2, 4, 8, 16, 32, 64)


def add_flags(command: argparse.ArgumentParser) -> None:
    """What the command takes."""
    command.add_argument("model", metavar="MODEL", help="directory, or hub id that was pulled")
    command.add_argument("--revision", default=None, help="branch, tag or commit of a hub model")


def run(options: dict[str, Any]) -> int:
    """Try all kernels for every matrix at 1 to 64 rows; later starts on this GPU use the fastest.

    The model's shapes are built with random weights: nothing but config.json is read.
    """
    import torch

    from pagedserve import config
    from pagedserve.device import Cuda, pick
    from pagedserve.kernels import gpu, tuning
    from pagedserve.models.hub import pulled

    device = pick("cuda")
    assert isinstance(device, Cuda), "cuda was asked for"
    if device.kernels is None:
        raise StartupError("triton is not installed: there are no kernels to choose from")
    directory = pulled(options["model"], options["revision"])
    products = tuning.products(*shapes_of(directory, device), ROWS)
    if not products:
        raise StartupError(f"{options['model']}: no matrix that our kernels read")
    torch.cuda.empty_cache()
    say(f"{len(products)} products to measure on {device.name}, a few seconds each")
    cache = config.cache_directory()
    table = tuning.measure(products, device.torch, cache, say)
    say(f"{len(table.findings)} findings are in {cache / gpu.TABLE}")
    return 0


def shapes_of(directory: Any, device: Cuda) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """(out, in) of all matrices of the model in `directory`, and of those that hold gate and up."""
    from pagedserve.models.loading import load_model

    assert device.kernels is not None
    model = load_model(directory, device=device, load_format="dummy", on_progress=say)
    return set(device.kernels.shapes), gates_of(model)


def gates_of(model: LoadedModel) -> set[tuple[int, int]]:
    """(out, in) of the matrices whose first half is a gate."""
    from pagedserve.kernels.activation import GATED
    from pagedserve.spec import DecoderSpec, Mlp, Moe

    found: set[tuple[int, int]] = set()
    if not isinstance(model.spec, DecoderSpec):
        return found
    for layer in model.spec.layers:
        ffn = layer.ffn.shared if isinstance(layer.ffn, Moe) else layer.ffn
        if isinstance(ffn, Mlp) and ffn.gated and ffn.act in GATED:
            found.add((2 * ffn.size, model.spec.hidden_size))
    return found
