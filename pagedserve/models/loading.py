"""Load a model: read its config, pick the dtype, fill the decoder, say what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pagedserve.device import Device
from pagedserve.errors import StartupError
from pagedserve.models import config_json
from pagedserve.models.architectures import spec_of
from pagedserve.models.assembly import assemble
from pagedserve.models.decoder import Decoder
from pagedserve.models.weights import Checkpoint, Dummy, Source
from pagedserve.spec import DecoderSpec


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What the worker and the engine need to know. `max_model_len`: the model's own limit."""

    spec: DecoderSpec
    decoder: Decoder
    eos_token_ids: list[int]
    max_model_len: int
    dtype: torch.dtype
    weight_bytes: int


def load_model(
    directory: Path,
    *,
    dtype: str = "auto",
    device: Device,
    load_format: str = "auto",
    seed: int = 0,
    on_progress: Callable[[str], None] = lambda phase: None,
) -> LoadedModel:
    """Read the model in `directory` onto `device`.

    `dtype` "auto" is the device's choice for the checkpoint's. `load_format` "dummy" reads
    config.json only and fills the weights from `seed`. `on_progress` gets phases for people.
    Raises StartupError for everything that can be wrong with a checkpoint.
    """
    config = config_json.read(directory)
    spec = spec_of(config)
    wanted = pick_dtype(dtype, config, device)
    source: Source
    if load_format == "dummy":
        on_progress("filling weights with random numbers")
        source = Dummy(seed, device.torch)
    else:
        on_progress("loading weights")
        source = Checkpoint(directory, spec, on_progress)
    decoder = assemble(spec, source, device=device, dtype=wanted)
    return LoadedModel(
        spec=spec,
        decoder=decoder,
        eos_token_ids=config_json.eos_token_ids(directory, config),
        max_model_len=spec.max_positions,
        dtype=wanted,
        weight_bytes=decoder.weight_bytes(),
    )


def pick_dtype(wanted: str, config: dict[str, Any], device: Device) -> torch.dtype:
    """The torch dtype for a `--dtype`; a checkpoint that names none counts as float32."""
    if wanted == "auto":
        checkpoint: torch.dtype = getattr(torch, config_json.dtype_name(config) or "float32")
        return device.default_dtype(checkpoint)
    if wanted not in config_json.DTYPES:
        raise StartupError(f"dtype must be auto, {', '.join(config_json.DTYPES)}, got {wanted!r}")
    named: torch.dtype = getattr(torch, wanted)
    return named
