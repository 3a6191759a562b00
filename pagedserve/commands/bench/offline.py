"""`pagedserve bench throughput` and `latency`: the engine itself, without HTTP and without text."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pagedserve.api import checkpoint
from pagedserve.api.checkpoint import TextSide
from pagedserve.commands.bench import machine
from pagedserve.commands.bench.figures import Outcome, show, spread, summary
from pagedserve.commands.bench.flags import ENGINE_GROUPS
from pagedserve.commands.bench.roofline import (
    ITEM_BYTES,
    Chip,
    Roofline,
    chip_named,
    read_spec,
)
from pagedserve.commands.bench.work import Ask, Encode, RandomWork, asks_of, facts_of
from pagedserve.config import Config, ModelConfig, each_option
from pagedserve.engine.channel import Finish, Progress, Ready
from pagedserve.engine.client import EngineClient
from pagedserve.errors import PagedServeError, StartupError
from pagedserve.request import Request, SamplingParams, check_prompt
from pagedserve.step import TokenLogprobs


def run_throughput(options: dict[str, Any]) -> int:
    """The command: all requests at once."""
    config, own = split(options)
    text = checkpoint.load(model_side(config, own), tell)
    with engine(config, text) as client:
        ready = settled(client)
        roof = roofline(config, text.directory, ready, own)
        encode = text.tokenizer.encode if text.tokenizer is not None else None
        own["random_vocab_size"] = own["random_vocab_size"] or ready.vocab_size
        asks = asks_of(
            own,
            own["num_prompts"],
            config.model.seed,
            encode=encode,
        )
        work = [(ids_of(ask, encode), ask.num_tokens) for ask in asks]
        outcomes = answer(client, work)
    figures = summary(outcomes)
    line = {"benchmark": "throughput", **facts(config, ready), **facts_of(own), **figures}
    if roof is not None and not figures["failed"]:
        floor = roof.work_seconds([(len(p), n) for p, n in work], ready.max_num_seqs)
        line |= share_of(roof.chip, floor, figures["duration_s"], "the whole")
    show(line, as_json=own["json"])
    return 1 if figures["failed"] else 0


def run_latency(options: dict[str, Any]) -> int:
    """The command: one batch after the other, each of new prompts."""
    config, own = split(options)
    text = checkpoint.load(replace(config.model, skip_tokenizer_init=True), tell)
    rows, length = own["batch_size"], own["output_len"]
    spans, outcomes = [], []
    with engine(config, text) as client:
        ready = settled(client)
        roof = roofline(config, text.directory, ready, own)
        prompts = RandomWork(rows, own["input_len"], length, vocab_size=ready.vocab_size)
        for number in range(own["num_iters_warmup"] + own["num_iters"]):
            asks = prompts.asks(config.model.seed + number)
            found = answer(client, [(ids_of(ask, None), ask.num_tokens) for ask in asks])
            if number >= own["num_iters_warmup"]:
                outcomes += found
                ends = [each.at[-1] for each in found if each.at]
                spans.append(max(ends, default=found[0].began) - found[0].began)
    names = ("input_len", "output_len", "batch_size", "num_iters")
    figures = summary(outcomes)
    line = {
        "benchmark": "latency",
        **facts(config, ready),
        **{name: own[name] for name in names},
        "batch_ms": spread(spans),
        **figures,
    }
    if roof is not None and not figures["failed"] and length > 1:
        step = 1e-3 * figures["tpot_ms"]["p50"]
        floor = roof.decode_seconds(rows, own["input_len"] + length / 2)
        line |= share_of(roof.chip, floor, step, "a decode step (TPOT p50)")
    show(line, as_json=own["json"])
    return 1 if figures["failed"] else 0


def split(options: dict[str, Any]) -> tuple[Config, dict[str, Any]]:
    """The engine's configuration and this command's own flags."""
    known = {option.name for group, option in each_option() if group in ENGINE_GROUPS}
    engine_options = {name: value for name, value in options.items() if name in known}
    own = {name: value for name, value in options.items() if name not in known}
    return Config.from_options(engine_options), own


def model_side(config: Config, own: dict[str, Any]) -> ModelConfig:
    """The model's options, without a tokenizer where prompts are token ids."""
    return replace(config.model, skip_tokenizer_init=own["dataset_name"] == "random")


def ids_of(ask: Ask, encode: Encode | None) -> list[int]:
    """A prompt's tokens."""
    if not isinstance(ask.prompt, str):
        return ask.prompt
    assert encode is not None, "text without a tokenizer"
    return encode(ask.prompt)


class Arrivals:
    """The engine client's sink of one request: when each token came."""

    def __init__(self, num_prompt: int) -> None:
        self.outcome = Outcome(time.monotonic(), num_prompt=num_prompt)
        self.ended = False

    def started(self, cached_tokens: int) -> None:
        pass

    def prompt_logprobs(self, entries: list[TokenLogprobs]) -> None:
        pass

    def token(self, token_id: int, logprobs: TokenLogprobs | None, finish: Finish | None) -> None:
        self.outcome.at.append(time.monotonic())
        self.ended = finish is not None

    def failed(self, error: PagedServeError) -> None:
        self.outcome.error = error.message
        self.ended = True


@contextlib.contextmanager
def engine(config: Config, text: TextSide) -> Iterator[EngineClient]:
    """A started engine. Raises StartupError with its cause where it cannot start."""
    client = EngineClient()
    client.on_progress = tell_phase
    try:
        client.configure(config.to_builtins() | text.engine_options())
        while client.ready is None:
            client.poll(None)
            if client.cause_of_death is not None:
                raise StartupError(client.cause_of_death)
        yield client
    finally:
        client.close(5.0 if client.ready else 0.1)


def settled(client: EngineClient) -> Ready:
    """What the engine said when it was ready."""
    assert client.ready is not None
    return client.ready


def answer(client: EngineClient, work: Sequence[tuple[list[int], int]]) -> list[Outcome]:
    """All at once, to the end, greedily. Raises RequestError for what the model cannot take.

    When the engine dies, what was under way has failed with the cause.
    """
    ready, requests = settled(client), []
    for prompt, length in work:
        params = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)
        params = check_prompt(
            prompt, params, vocab_size=ready.vocab_size, max_model_len=ready.max_model_len
        )
        requests.append(Request(client.next_id(), prompt, params, 0, 0, time.monotonic()))
    sinks = [Arrivals(len(prompt)) for prompt, _ in work]
    client.submit(requests, sinks)
    while any(not sink.ended for sink in sinks):
        client.poll(None)
    for sink in sinks:
        sink.outcome.num_tokens = len(sink.outcome.at)
    return [sink.outcome for sink in sinks]


def facts(config: Config, ready: Ready) -> dict[str, Any]:
    """What ran, and on what."""
    return {
        "model": config.model.model,
        "load_format": config.model.load_format,
        "dtype": ready.dtype,
        "device": ready.device,
        "num_blocks": ready.num_blocks,
        "max_num_seqs": ready.max_num_seqs,
        "seed": config.model.seed,
        **machine.versions(),
    }


def roofline(config: Config, directory: Path, ready: Ready, own: dict[str, Any]) -> Roofline | None:
    """The model on this device; None for a device of unknown figures and a model without a spec.

    Raises PagedServeError for one of the two figures without the other, on an unknown device.
    """
    chip, memory, products = chip_named(ready.device), own["memory_tb_per_s"], own["tflops"]
    if memory is not None or products is not None:
        if chip is None and (memory is None or products is None):
            raise PagedServeError(
                f"nothing is known of {ready.device}: give --memory-tb-per-s and --tflops both"
            )
        chip = Chip(
            1e12 * memory if memory is not None or chip is None else chip.bytes_per_s,
            1e12 * products if products is not None or chip is None else chip.flops_per_s,
            "given",
        )
    spec = read_spec(directory, config.model.hf_overrides)
    if chip is None or spec is None:
        return None
    return Roofline(spec, chip, ITEM_BYTES[ready.dtype])


def share_of(chip: Chip, floor: float, seconds: float, of: str) -> dict[str, Any]:
    """The roofline's fields of the line: the least time, and the share of the measured one."""
    return {
        "roofline": {
            "of": of,
            "floor_ms": round(1e3 * floor, 3),
            "fraction": round(floor / seconds, 3) if seconds else None,
            "tb_per_s": chip.bytes_per_s / 1e12,
            "tflops": chip.flops_per_s / 1e12,
            "source": chip.source,
        }
    }


def tell(phase: str, detail: str, done: int = 0, total: int = 0) -> None:
    """A line on standard error."""
    print(f"{phase} {detail}".rstrip(), file=sys.stderr)


def tell_phase(message: Progress | Ready) -> None:
    """The phase of the start."""
    if isinstance(message, Ready):
        tell(f"{message.seconds:6.2f} s  ready,", f"{message.dtype} on {message.device}")
    elif not message.detail:
        tell(f"{message.seconds:6.2f} s ", message.phase)
