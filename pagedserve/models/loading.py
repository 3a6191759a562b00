"""Load a model: read its config, pick who computes it and in which dtype, say what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pagedserve.config import ModelConfig
from pagedserve.device import Device
from pagedserve.errors import StartupError
from pagedserve.models import config_json, generation_config
from pagedserve.models.architectures import is_native, spec_of
from pagedserve.models.assembly import assemble
from pagedserve.models.base import Model
from pagedserve.models.custom import run_architecture_file
from pagedserve.models.hub.progress import part
from pagedserve.models.ring import CudaUploads, Ring
from pagedserve.models.shards import Files
from pagedserve.models.telling import Tell, tell_nobody
from pagedserve.models.weights import Checkpoint, Dummy, Shapes, Source
from pagedserve.spec import DecoderSpec, ModelShape


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What the worker and the engine need to know. `max_model_len`: the model's own limit."""

    spec: ModelShape
    decoder: Model
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
    context: int | None = None,
    hf_overrides: Mapping[str, Any] | None = None,
    model_impl: str = "auto",
    architecture_file: str | None = None,
    generation_source: str = "auto",
    generation_override: Mapping[str, Any] | None = None,
    on_progress: Callable[[str], None] = lambda phase: None,
    on_bytes: Callable[[int, int], None] | None = None,
) -> LoadedModel:
    """Read the model in `directory` onto `device`.

    `dtype` "auto" is the device's choice for the checkpoint's. `load_format` "dummy" reads
    config.json only and fills the weights from `seed`. `context`: the longest context that will be
    served; the model's own if None. `hf_overrides` are merged into config.json; `model_impl`:
    "native", "transformers" (see `fallback`), or "auto", the first where there is one;
    `architecture_file` adds native ones (`custom`);
    `generation_source` and `generation_override` say where the end tokens come from
    (`generation_config.read`). `on_progress` gets phases for people, `on_bytes`
    how many bytes of the weights were read, of how many. Raises StartupError for
    everything that can be wrong with a checkpoint.
    """
    if architecture_file is not None:
        names = run_architecture_file(Path(architecture_file))
        on_progress(f"{architecture_file} was run and adds {', '.join(names)}")
    config = config_json.plain(directory, hf_overrides)
    wanted = pick_dtype(dtype, config, device)
    spec: ModelShape
    decoder: Model
    if is_native(config, model_impl):
        config = config_json.complete(config)
        spec = spec_of(config)
        limit = context_limit(spec, context)
        source = weights(directory, spec, load_format, seed, device, on_progress, on_bytes)
        decoder = assemble(spec, source, device=device, dtype=wanted, context=limit)
    elif device.torch.type == "meta":
        raise StartupError(
            f"{directory} is computed by the modeling of transformers, whose memory nothing tells "
            "but its start"
        )
    else:
        from pagedserve.models.fallback.load import Asked, load_fallback  # transformers is slow

        asked = Asked(directory, wanted, device, load_format, seed, context)
        decoder = load_fallback(config, asked, on_progress)
        spec, limit = decoder.spec, context_limit(decoder.spec, context)
    generation = generation_config.read(
        directory, config, source=generation_source, override=generation_override
    )
    return LoadedModel(
        spec=spec,
        decoder=decoder,
        # What is outside the vocabulary can never come.
        eos_token_ids=[id for id in generation.end_token_ids if 0 <= id < spec.vocab_size],
        max_model_len=limit,
        dtype=wanted,
        weight_bytes=decoder.weight_bytes(),
    )


def load_configured(
    asked: ModelConfig,
    directory: Path,
    device: Device,
    tell: Tell = tell_nobody,
) -> LoadedModel:
    """`load_model` as a configuration says."""
    phase = "load weights"
    return load_model(
        directory,
        dtype=asked.dtype,
        device=device,
        load_format=asked.load_format,
        seed=asked.seed,
        context=asked.max_model_len,
        hf_overrides=asked.hf_overrides,
        model_impl=asked.model_impl,
        architecture_file=asked.architecture_file,
        generation_source=asked.generation_config,
        generation_override=asked.override_generation_config,
        on_progress=lambda detail: tell(phase, detail),
        on_bytes=lambda done, total: tell(
            phase, f"{part(done, total)} ({100 * done // total} %)", done, total
        ),
    )


def weights(
    directory: Path,
    spec: DecoderSpec,
    load_format: str,
    seed: int,
    device: Device,
    on_progress: Callable[[str], None],
    on_bytes: Callable[[int, int], None] | None,
) -> Source:
    """Where the decoder's weights come from."""
    if device.torch.type == "meta":
        return Shapes()
    if load_format == "dummy":
        on_progress("filling weights with random numbers")
        return Dummy(seed, device.torch)
    on_progress("loading weights")
    files = Ring(CudaUploads()) if device.is_gpu else Files()
    return Checkpoint(directory, spec, on_progress, files, on_bytes)


def context_limit(spec: ModelShape, asked: int | None) -> int:
    """The context in tokens. Raises StartupError where more is asked for than the model can do."""
    allowed = spec.stretched_positions or spec.max_positions
    if asked is not None and asked > allowed:
        raise StartupError(
            f"max_model_len is {asked}, but the model's positions end at {allowed}",
            param="max_model_len",
        )
    return asked or spec.max_positions


def pick_dtype(wanted: str, config: dict[str, Any], device: Device) -> torch.dtype:
    """The torch dtype for a `--dtype`; a checkpoint that names none counts as float32."""
    if wanted == "auto":
        checkpoint: torch.dtype = getattr(torch, config_json.dtype_name(config) or "float32")
        return device.default_dtype(checkpoint)
    if wanted not in config_json.DTYPES:
        raise StartupError(f"dtype must be auto, {', '.join(config_json.DTYPES)}, got {wanted!r}")
    named: torch.dtype = getattr(torch, wanted)
    return named
