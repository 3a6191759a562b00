"""Configuration: frozen groups, read once, resolved once, handed down as the smallest piece needed.

The command line, its help and `LLM(...)` keywords are generated from these fields, so a flag exists
exactly once. This is the only room that reads the environment. Nothing here touches torch or a
device: what depends on a model or on free memory is settled in the engine process, which reports it
back when it is ready (`channel.Ready`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pagedserve.errors import StartupError
from pagedserve.limits import Limits

DEMO_MODEL = str(Path(__file__).parent / "demo")
API_KEY_VARIABLE = "PAGEDSERVE_API_KEY"
DTYPES = ("auto", "float32", "bfloat16", "float16")


def option(
    default: Any, help: str, *, choices: tuple[str, ...] | None = None, low: float | None = None
) -> Any:
    """A config field with its help text, its choices and its lowest allowed value."""
    return field(default=default, metadata={"help": help, "choices": choices, "low": low})


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which weights, and how they are held."""

    model: str = option(
        DEMO_MODEL, "directory or hub id of the model; the bundled demo if left out"
    )
    revision: str | None = option(None, "branch, tag or commit of a hub model")
    offline: bool = option(False, "never use the network: hub models come from the cache")
    hf_overrides: dict[str, Any] | None = option(
        None, "JSON object merged into the model's config.json before it is read"
    )
    tokenizer: str | None = option(
        None, "directory or hub id of the tokenizer, if not the model's own"
    )
    tokenizer_revision: str | None = option(
        None, "branch, tag or commit of a tokenizer from the hub"
    )
    skip_tokenizer_init: bool = option(False, "load no tokenizer: token ids in, token ids out")
    served_model_name: str | None = option(None, "name clients use; the model's own if left out")
    chat_template: str | None = option(
        None, "file with a Jinja chat template, or the name of one of the model's, to use instead"
    )
    generation_config: str = option(
        "auto",
        "where sampling defaults and end tokens come from: auto is the model's own "
        "generation_config.json, none is no file, or a directory with one",
    )
    override_generation_config: dict[str, Any] | None = option(
        None, "JSON object merged over generation_config.json"
    )
    model_impl: str = option(
        "auto",
        "native: our own decoder; transformers: the modeling of transformers with our attention; "
        "auto: native for every architecture that we have",
        choices=("auto", "native", "transformers"),
    )
    architecture_file: str | None = option(
        None, "Python file of yours that is run at the start and adds architectures with @arch"
    )
    dtype: str = option("auto", "auto: the checkpoint's on a GPU, float32 on a CPU", choices=DTYPES)
    device: str = option(
        "auto", "auto: the GPU where there is one", choices=("auto", "cpu", "cuda")
    )
    load_format: str = option(
        "auto",
        "dummy: random weights of the right shapes",
        choices=("auto", "safetensors", "dummy"),
    )
    max_model_len: int | None = option(
        None, "longest sequence in tokens; what the model and memory allow if left out", low=1
    )
    seed: int = option(0, "seed of dummy weights and of requests that bring none", low=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig:
    """The block-allocated KV cache."""

    block_size: int = option(16, "tokens in a KV block", low=1)
    gpu_memory_utilization: float = option(
        0.9, "share of the GPU's memory that the server may use", low=0.01
    )
    kv_cache_memory_bytes: int | None = option(
        None, "size of the KV cache; planned from free memory if left out", low=1
    )
    num_gpu_blocks_override: int | None = option(
        None, "number of KV blocks, on any device, instead of a size", low=1
    )
    enable_prefix_caching: bool = option(True, "reuse KV blocks of equal prompt beginnings")


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerConfig:
    """How sequences share the device."""

    max_num_seqs: int | None = option(
        None,
        "sequences computed at a time, on a GPU at most 4096; if left out 256 there, or as many as "
        "memory allows, and 64 on a CPU",
        low=1,
    )
    max_num_batched_tokens: int | None = option(
        None,
        "tokens computed in one step; if left out 8192 on a GPU, or as many as memory allows, and "
        "512 on a CPU",
        low=1,
    )
    enforce_eager: bool = option(False, "run every step op by op: no CUDA graphs, no overlap")
    async_scheduling: bool | None = option(
        None, "launch a step before the last one's tokens are seen; on by default on a GPU"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """The HTTP side."""

    host: str = option(
        "127.0.0.1", "address to listen on; one that others reach needs an API key, or --insecure"
    )
    port: int = option(8000, "port to listen on; 0 picks a free one", low=0)
    api_key: str | None = option(None, "key that clients must send (or set PAGEDSERVE_API_KEY)")
    api_key_file: str | None = option(
        None,
        "file of keys, a name:key a line, with scopes, shares and quotas; read again when it "
        "changes, and on SIGHUP",
    )
    insecure: bool = option(
        False, "listen on an address that others reach although no API key is set"
    )
    allowed_host: tuple[str, ...] = option(
        (),
        "name by which clients may call this server (their Host header), beside its own; give it "
        "again for more; * is any",
    )
    allowed_origin: tuple[str, ...] = option(
        (),
        "origin of web pages that may use this server, such as https://app.example.com; give it "
        "again for more; * is any; none if left out",
    )
    ssl_certfile: str | None = option(
        None, "PEM file with the certificate, and those between it and its root: serve HTTPS"
    )
    ssl_keyfile: str | None = option(
        None, "PEM file with the certificate's key; --ssl-certfile holds it if left out"
    )
    ssl_ca_certs: str | None = option(
        None, "PEM file with the roots of client certificates: clients must show one"
    )
    share_prefix_cache: bool = option(
        False,
        "let requests find the prompt beginnings of other API keys in the prefix cache: faster "
        "where many send the same, and its speed tells them what others sent",
    )
    max_queued_requests: int | None = option(
        None,
        "sequences that may wait beyond the --max-num-seqs that are computed, before requests are "
        "refused with 429; 8 times as many, and 1024 at least, if left out",
        low=0,
    )
    max_queued_tokens: int | None = option(
        None,
        "prompt tokens that may wait before requests are refused with 429; 4 times what the KV "
        "cache holds, and a million at least, if left out",
        low=1,
    )
    max_requests_per_key: int = option(
        0, "requests and streams that one API key may have open at once; 0 is no limit", low=0
    )
    queue_timeout: float = option(
        0.0, "seconds a request may wait before it is computed; 0 is no limit", low=0
    )
    ttft_timeout: float = option(
        0.0, "seconds a request may take to its first token; 0 is no limit", low=0
    )
    request_timeout: float = option(0.0, "seconds a request may take in all; 0 is no limit", low=0)
    max_body_bytes: int = option(16 << 20, "longest request body", low=1024)
    limits: dict[str, Any] | None = option(
        None,
        'JSON object of limits on what one request may have, such as \'{"n": 4, "prompts": 8}\'; '
        "docs/api.md lists them",
    )
    shutdown_timeout: float = option(
        30.0, "seconds that running requests get to finish after Ctrl-C or SIGTERM", low=0
    )
    access_log: bool = option(False, "log every HTTP request")
    log_prompts: bool = option(
        False, "log the prompts and parameters of every request; else no text of clients is logged"
    )
    max_engine_restarts: int = option(
        5,
        "times in a row that a dead engine of a server is restarted, its requests going on, with "
        "no token between; 0: the server ends with its engine, and replaces none that stalls",
        low=0,
    )
    load_timeout: float = option(
        900.0,
        "seconds without progress after which a start that hangs is given up, or tried again where "
        "the engine had served; 0 is never",
        low=0,
    )
    engine_stall_timeout: float | None = option(
        None,
        "seconds without a sign of life after which an engine is restarted; 120 on a GPU, 600 on "
        "a CPU if left out, 0 is never",
        low=0,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """All groups together."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    server: ServerConfig = field(default_factory=ServerConfig)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Config:
        """Build from flat names (`LLM` keywords, parsed flags). Raises StartupError."""
        groups: dict[str, dict[str, Any]] = {name: {} for name in GROUPS}
        where = {option.name: group for group, option in each_option()}
        for name, value in options.items():
            if name not in where:
                raise StartupError(f"there is no option {name!r}", param=name)
            group = where[name]
            kind = plain_type(GROUPS[group], name)
            groups[group][name] = PLAIN[kind](name, value) if kind in PLAIN else value
        built: dict[str, Any] = {name: GROUPS[name](**values) for name, values in groups.items()}
        config = cls(**built)
        config.check()
        return config

    def check(self) -> None:
        """Raise StartupError for a value outside its range."""
        for group, option_ in each_option():
            value = getattr(getattr(self, group), option_.name)
            check_value(option_, value)
        if self.cache.gpu_memory_utilization > 1:
            raise StartupError("gpu_memory_utilization must be at most 1")
        Limits.of(self.server.limits)
        if self.server.port > 65535:
            raise StartupError("port must be at most 65535")

    def to_builtins(self) -> dict[str, Any]:
        """Flat names and builtins, to cross a process boundary; `from_options` is the inverse."""
        return {
            option.name: getattr(getattr(self, group), option.name)
            for group, option in each_option()
        }


GROUPS: dict[str, type] = {
    "model": ModelConfig,
    "cache": CacheConfig,
    "scheduler": SchedulerConfig,
    "server": ServerConfig,
}


def each_option() -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Every option with the name of its group."""
    for group, kind in GROUPS.items():
        for option_ in dataclasses.fields(kind):
            yield group, option_


def plain_type(kind: type, name: str) -> type:
    """The type of a field without its `| None`; `dict` for a JSON object, `tuple` for texts."""
    hint = typing.get_type_hints(kind)[name]
    if isinstance(hint, types.UnionType):
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    return typing.cast(type, typing.get_origin(hint) or hint)


def plain_object(name: str, value: Any) -> dict[str, Any] | None:
    """A JSON object as a dict, given as one or as its text. Raises StartupError."""
    flag = "--" + name.replace("_", "-")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise StartupError(f"{flag} is not valid JSON: {error}", param=name) from error
    if value is not None and not isinstance(value, dict):
        raise StartupError(
            f"{flag} must be a JSON object, such as '{{\"key\": 1}}', got {value!r:.64}",
            param=name,
        )
    return typing.cast("dict[str, Any] | None", value)


def plain_texts(name: str, value: Any) -> tuple[str, ...]:
    """The values of a flag that may be given again and again. Raises StartupError."""
    if not isinstance(value, (list, tuple)) or not all(isinstance(each, str) for each in value):
        raise StartupError(f"{name} must be a list of texts, got {value!r:.64}", param=name)
    return tuple(value)


# Types whose values cross as something else, or may be given as text, and what makes them again.
PLAIN: dict[type, Callable[[str, Any], Any]] = {dict: plain_object, tuple: plain_texts}


def check_value(option_: dataclasses.Field[Any], value: Any) -> None:
    """Raise StartupError where `value` is none of the choices or below the lowest allowed."""
    choices, low = option_.metadata["choices"], option_.metadata["low"]
    if value is None:
        return
    if choices and value not in choices:
        raise StartupError(f"{option_.name} must be one of {', '.join(choices)}, got {value!r}")
    if low is not None and not value >= low:
        raise StartupError(f"{option_.name} must be at least {low}, got {value!r}")


def add_flags(parser: argparse.ArgumentParser, *, groups: tuple[str, ...] = tuple(GROUPS)) -> None:
    """Add a flag for every option of `groups`; flags left out stay out of the parsed namespace."""
    for group in groups:
        kind = GROUPS[group]
        section = parser.add_argument_group(group, (kind.__doc__ or "").strip())
        for option_ in dataclasses.fields(kind):
            flag = "--" + option_.name.replace("_", "-")
            text, choices = option_.metadata["help"], option_.metadata["choices"]
            if option_.default not in (None, DEMO_MODEL, ()):
                text += f" (default: {option_.default})"
            value_type = plain_type(kind, option_.name)
            if value_type is bool:
                action: Any = argparse.BooleanOptionalAction
                section.add_argument(flag, action=action, default=argparse.SUPPRESS, help=text)
            else:
                section.add_argument(
                    flag,
                    action="append" if value_type is tuple else "store",
                    type=str if value_type in PLAIN else value_type,  # read by `from_options`
                    choices=choices,
                    default=argparse.SUPPRESS,
                    help=text.replace("%", "%%"),
                    metavar=metavar(option_.name, value_type, choices),
                )


def metavar(name: str, kind: type, choices: tuple[str, ...] | None) -> str | None:
    """How the help calls a flag's value; None where it lists the choices."""
    if choices:
        return None
    if kind is dict:
        return "JSON"
    if name.endswith("_timeout"):
        return "SECONDS"
    word = name.rsplit("_", 1)[-1].upper()
    return "N" if kind in (int, float) and word not in ("BYTES", "PORT", "SEED") else word


def api_key_from_environment() -> str | None:
    """PAGEDSERVE_API_KEY, so that a key need not stand in the process list."""
    return os.environ.get(API_KEY_VARIABLE) or None


def environment_without_keys() -> dict[str, str]:
    """What a child process that has no need of our key may inherit."""
    return {name: value for name, value in os.environ.items() if name != API_KEY_VARIABLE}


def cache_directory() -> Path:
    """Where compiled kernels are kept: PAGEDSERVE_CACHE_DIR, or the user's cache directory."""
    if own := os.environ.get("PAGEDSERVE_CACHE_DIR"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pagedserve"


def kernel_directories() -> tuple[Path, ...]:
    """Where compiled C++ and CUDA kernels may lie: PAGEDSERVE_KERNELS_DIR, then the cache.

    What is compiled by a start goes into the last.
    """
    ahead = os.environ.get("PAGEDSERVE_KERNELS_DIR")
    return (*([Path(ahead)] if ahead else []), cache_directory() / "kernels")


def triton_cache_directory() -> Path | None:
    """Where Triton keeps compiled kernels; None where its own variables say so."""
    if os.environ.get("TRITON_CACHE_DIR") or os.environ.get("TRITON_HOME"):
        return None
    return cache_directory() / "triton"


def cpu_kernels_wanted() -> bool:
    """False where PAGEDSERVE_CPU_KERNELS is "off": torch's ops instead of ours, to compare them."""
    return os.environ.get("PAGEDSERVE_CPU_KERNELS") != "off"


def cuda_kernels_wanted() -> bool:
    """False where PAGEDSERVE_CUDA_KERNELS is "off": Triton's attention, also where C++ fits."""
    return os.environ.get("PAGEDSERVE_CUDA_KERNELS") != "off"
