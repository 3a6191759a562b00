"""Bring a transformers class up as a fallback, or say why it cannot be one.

Weights come through transformers' own loader: safetensors only, no code of the checkpoint's.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as their_logging

from pagedserve.device import Device
from pagedserve.errors import StartupError, shorten
from pagedserve.models.architectures.registry import ARCHITECTURES
from pagedserve.models.fallback import Fallback, FallbackSpec
from pagedserve.models.fallback.attention import PAGED, PROBE, NotExpressible, register
from pagedserve.models.fallback.check import check
from pagedserve.models.fallback.probe import Traced, trace, trace_shapes
from pagedserve.models.hub.filenames import listing
from pagedserve.models.shards import Stored, stored_tensors
from pagedserve.models.weights import DUMMY_RANGE

OF_THE_BATCH = ("dynamic", "longrope")  # rope types whose angles depend on the longest sequence


@dataclass(frozen=True, slots=True)
class Found:
    """A class of transformers with its config, before anything is built."""

    name: str
    kind: Any
    config: Any

    @property
    def text(self) -> Any:
        """The part of the config that is about text."""
        return self.config.get_text_config()

    def build(self, implementation: str, dtype: torch.dtype) -> Any:
        """With weights of no meaning, on torch's current device."""
        config = copy.deepcopy(self.config)
        return self.kind._from_config(
            config, attn_implementation=implementation, dtype=dtype
        ).eval()


@dataclass(frozen=True, slots=True)
class Asked:
    """What the start was asked for; see `loading.load_model`."""

    directory: Path
    dtype: torch.dtype
    device: Device
    load_format: str
    seed: int
    context: int | None


def load_fallback(
    config: Mapping[str, Any], asked: Asked, on_progress: Callable[[str], None]
) -> Fallback:
    """The model whose config.json, as it stands there, is `config`.

    Raises StartupError, naming class and reason, where there is none that can be served, and for
    everything that can be wrong with a checkpoint.
    """
    if not asked.device.is_gpu:
        # `Cpu.prepare` leaves torch one thread, as our own kernels do the work; here torch does it.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - 1))
    with quietly():
        found = find(config)
        try:
            return start(found, asked, on_progress)
        except NotExpressible as reason:
            raise refused(found.name, str(reason)) from reason


def refused(name: str, reason: str) -> StartupError:
    """What a user hears of a class that cannot be served."""
    version = transformers.__version__
    if name in ARCHITECTURES:
        return StartupError(
            f"architecture {name} is not supported by --model-impl transformers ({version}), which "
            f"cannot run here, as {reason}. There is a native family: leave the flag out"
        )
    return StartupError(
        f"architecture {name} is not supported: there is no native family, and transformers' "
        f"modeling ({version}) cannot run here, as {reason}. `pagedserve models` lists what is "
        "supported"
    )


def find(config: Mapping[str, Any]) -> Found:
    """The class of config.json. Raises StartupError where transformers has none that fits."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str):
        raise StartupError("config.json: architectures must be a list of class names")
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise StartupError(
            f"architecture {name} is not supported: there is no native family, and transformers "
            f"{transformers.__version__} has no causal language model of this name. `pagedserve "
            "models` lists what is supported"
        )
    if config.get("quantization_config"):
        raise refused(name, "its checkpoint is quantised")
    kind = getattr(transformers, name)
    if not kind._supports_attention_backend:
        raise refused(name, "the class does not let attention be replaced")
    return Found(name, kind, read_config(name, kind, config))


def read_config(name: str, kind: Any, config: Mapping[str, Any]) -> Any:
    """transformers' config object. Raises StartupError."""
    plain = {key: numbers(value) for key, value in config.items() if key != "auto_map"}
    try:
        whole = transformers.AutoConfig.for_model(plain.get("model_type", ""))
        whole = type(whole).from_dict(plain)
    # A config's own checks raise what they like; each is about the file.
    except Exception as error:
        raise StartupError(f"config.json of {name} cannot be read: {first_line(error)}") from error
    if getattr(kind, "config_class", None) is type(whole.get_text_config()):
        return whole.get_text_config()
    return whole


def numbers(value: Any) -> Any:
    """A value of config.json, with infinities read that transformers wrote as an object."""
    if isinstance(value, list):
        return [numbers(each) for each in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"__float__"}:
        return float(value["__float__"])
    return {key: numbers(each) for key, each in value.items()}


def start(found: Found, asked: Asked, on_progress: Callable[[str], None]) -> Fallback:
    """Trace, load, trace again, check. Raises NotExpressible and StartupError."""
    register()
    layers = found.text.num_hidden_layers
    positions = max_positions(found.text, asked.context)
    on_progress(f"tracing {found.name} of transformers {transformers.__version__}")
    shapes = trace_shapes(on_meta(found), layers)
    if asked.load_format == "dummy":
        on_progress("filling weights with random numbers")
        model = dummy(found, asked)
    else:
        on_progress("loading weights")
        model = checkpoint(found, asked)
    traced = trace_numbers(model, layers)
    if shapes is not None and shapes.layers != traced.layers:
        raise NotExpressible("its attention depends on more than its config")
    spec = FallbackSpec(
        name=found.name,
        hidden_size=traced.hidden_size,
        vocab_size=traced.vocab_size,
        max_positions=positions,
        attention=traced.layers,
        ffn_size=ffn_size(found.text),
    )
    model.set_attn_implementation(PAGED)
    fallback = Fallback(model, spec, traced, asked.dtype)
    on_progress("comparing with transformers' own attention")
    try:
        check(fallback, asked.device)
    except StartupError:
        raise
    except Exception as error:
        raise_unless_refusal(error)
        raise NotExpressible(f"it fails over the paged cache: {first_line(error)}") from error
    return fallback


def on_meta(found: Found) -> Any:
    """The model without weights. Raises StartupError for a config that makes none."""
    try:
        with torch.device("meta"):
            return found.build(PROBE, torch.bfloat16)
    # Whatever a model's own code says of a config that it was not made for.
    except Exception as error:
        raise StartupError(
            f"config.json of {found.name} makes no model: {first_line(error)}"
        ) from error


def trace_numbers(model: Any, layers: int) -> Traced:
    """`trace` with weights. Raises NotExpressible for all that goes wrong in the model's code."""
    model.set_attn_implementation(PROBE)
    try:
        return trace(model, layers)
    except Exception as error:
        raise_unless_refusal(error)
        raise NotExpressible(
            f"its forward fails with our attention: {first_line(error)}"
        ) from error


def raise_unless_refusal(error: Exception) -> None:
    """Let through what already says why, and what is no fault of the model: memory."""
    if isinstance(error, NotExpressible | MemoryError | torch.OutOfMemoryError):
        raise error


def max_positions(config: Any, context: int | None) -> int:
    """The longest context. Raises StartupError where nothing says how long it may be."""
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
    said = (getattr(config, name, None) for name in names)
    limit: int | None = next((n for n in said if type(n) is int), context)
    if limit is None:
        raise StartupError(
            "config.json gives no longest context; give one with --max-model-len",
            param="max_model_len",
        )
    for rope in ropes(getattr(config, "rope_parameters", None) or {}):
        if rope.get("rope_type") in OF_THE_BATCH:
            # Beyond this the angles of all sequences of a batch would change with the longest one.
            limit = min(limit, rope.get("original_max_position_embeddings") or limit)
    return limit


def ropes(parameters: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """One, or one a kind of layer."""
    if "rope_type" in parameters:
        return [parameters]
    return [each for each in parameters.values() if isinstance(each, Mapping)]


def ffn_size(config: Any) -> int:
    """Numbers a token in the middle of the widest feed-forward, as far as the config says."""
    dense = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    sizes = [dense, getattr(config, "moe_intermediate_size", None) or dense]
    chosen = getattr(config, "num_experts_per_tok", None) or 1
    widest = [max(size) if isinstance(size, list | tuple) else int(size) for size in sizes]
    return max(widest[0], widest[1] * (max(chosen) if isinstance(chosen, list) else int(chosen)))


def dummy(found: Found, asked: Asked) -> Any:
    """Seeded uniform numbers within ±1e-3 for every parameter, as `weights.Dummy`."""
    where = asked.device.torch
    with no_init_weights(), where:
        model = found.build(PAGED, asked.dtype)
    model.tie_weights()
    generator = torch.Generator(where).manual_seed(asked.seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-DUMMY_RANGE, DUMMY_RANGE, generator=generator)
    return model


def checkpoint(found: Found, asked: Asked) -> Any:
    """The weights of the safetensors files, every tensor accounted for. Raises StartupError."""
    directory = asked.directory
    stored = stored_tensors(directory)  # pickles, damaged and missing files have their own messages
    try:
        model, info = found.kind.from_pretrained(
            directory,
            config=copy.deepcopy(found.config),
            attn_implementation=PAGED,
            dtype=asked.dtype,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # to be told of all of them, below
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (RuntimeError, ValueError, OSError, KeyError, TypeError) as error:
        raise StartupError(
            f"transformers cannot load {directory} as {found.name}: {first_line(error)}"
        ) from error
    for kind, words in (
        ("missing_keys", "lacks {} tensors that its config.json needs: {}"),
        ("unexpected_keys", "holds {} tensors that its architecture does not use: {}"),
        ("mismatched_keys", "holds {} tensors of other shapes than config.json asks for: {}"),
    ):
        found_keys = info.get(kind) or ()
        if names := sorted(k if isinstance(k, str) else str(k[0]) for k in found_keys):
            raise StartupError(f"{directory} {words.format(len(names), listing(names))}")
    keep_padding_rows(model, stored)
    return model.eval().to(asked.device.torch)


def keep_padding_rows(model: Any, stored: Mapping[str, Stored]) -> None:
    """Read them again: some classes set an embedding's row of the padding token to zero when they
    load, although it is a row of the head too where the two are tied."""
    for name, module in model.named_modules():
        row = getattr(module, "padding_idx", None)
        key = f"{name}.weight"
        if isinstance(module, torch.nn.Embedding) and row is not None and key in stored:
            with safe_open(stored[key].path, "pt") as file, torch.no_grad():
                module.weight[row] = file.get_slice(key)[row].to(module.weight)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Inside, transformers says nothing: what matters of it becomes an error here."""
    level, bar = their_logging.get_verbosity(), their_logging.is_progress_bar_enabled()
    their_logging.set_verbosity(logging.CRITICAL)
    their_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        their_logging.set_verbosity(level)
        if bar:
            their_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def first_line(error: Exception) -> str:
    """What an exception says, on one line."""
    return shorten(f"{type(error).__name__}: {' '.join(str(error).split())}", 300)
