"""The flags of `pagedserve bench`, named as vLLM's where both have them."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from pagedserve.commands.bench.figures import LATENCIES, PERCENTILES
from pagedserve.commands.bench.work import DATASETS
from pagedserve.config import add_flags as add_config_flags

ENGINE_GROUPS = ("model", "cache", "scheduler")
DEFAULT_URL = "http://127.0.0.1:8000"


def serve(command: argparse.ArgumentParser) -> None:
    """`bench serve`."""
    add = command.add_argument
    add("--base-url", default=DEFAULT_URL, help=f"the server (default: {DEFAULT_URL})")
    add("--model", help="model name to ask for (default: the first that the server lists)")
    add("--api-key", help="key to send (or set PAGEDSERVE_API_KEY)")
    add(
        "--request-rate",
        type=rate,
        default=rate("inf"),
        metavar="R",
        help="requests a second, Poisson arrivals (default: inf, all at once)",
    )
    add(
        "--max-concurrency",
        type=positive,
        metavar="N",
        help="requests under way at a time (default: all)",
    )
    add(
        "--num-warmups",
        type=whole,
        default=0,
        metavar="N",
        help="requests sent before, of other prompts, and not measured (default: 0)",
    )
    add(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="answers have the length asked for; what is shorter counts as failed (default: yes)",
    )
    add("--temperature", type=positive_or_zero, default=0.0, help="(default: 0)")
    add(
        "--timeout",
        type=positive_number,
        default=600.0,
        metavar="S",
        help="seconds after which a request counts as failed (default: 600)",
    )
    add(
        "--client-processes",
        type=positive,
        default=4,
        metavar="N",
        help="processes that send, so that the client is not what is measured (default: 4)",
    )
    add("--seed", type=whole, default=0, help="of prompts and arrivals (default: 0)")
    add_work(command, num_prompts=100, random_len=(1024, 128))
    add("--tokenizer", metavar="MODEL", help="directory or hub id; counts a sharegpt file's tokens")
    add(
        "--percentile-metrics",
        type=names,
        default=list(LATENCIES),
        metavar="NAMES",
        help=f"of {','.join(LATENCIES)} (default: all)",
    )
    add(
        "--metric-percentiles",
        type=percentiles,
        default=list(PERCENTILES),
        metavar="LIST",
        help="(default: 50,90,99)",
    )
    add("--save-result", action="store_true", help="also write a JSON file with every request")
    add(
        "--result-filename",
        type=Path,
        metavar="FILE",
        help="where (default: bench-serve-TIME.json)",
    )
    add_json(command)


def throughput(command: argparse.ArgumentParser) -> None:
    """`bench throughput`."""
    add_work(command, num_prompts=100, random_len=(512, 128))
    add_json(command)
    add_roofline(command)
    add_config_flags(command, groups=ENGINE_GROUPS)


def latency(command: argparse.ArgumentParser) -> None:
    """`bench latency`."""
    add = command.add_argument
    for name, default, text in (
        ("--input-len", 32, "tokens of each prompt"),
        ("--output-len", 128, "tokens of each answer"),
        ("--batch-size", 8, "requests at a time"),
        ("--num-iters", 10, "measured batches"),
    ):
        add(name, type=positive, default=default, metavar="N", help=f"{text} (default: {default})")
    add(
        "--num-iters-warmup",
        type=whole,
        default=3,
        metavar="N",
        help="batches before, not measured (default: 3)",
    )
    add_json(command)
    add_roofline(command)
    add_config_flags(command, groups=ENGINE_GROUPS)


def startup(command: argparse.ArgumentParser) -> None:
    """`bench startup`."""
    add = command.add_argument
    add("--runs", type=positive, default=3, metavar="N", help="starts to measure (default: 3)")
    add(
        "--timeout",
        type=positive_number,
        default=600.0,
        metavar="S",
        help="seconds after which a start counts as failed (default: 600)",
    )
    add_json(command)
    add_config_flags(command, groups=ENGINE_GROUPS)


def add_work(
    command: argparse.ArgumentParser, *, num_prompts: int, random_len: tuple[int, int]
) -> None:
    """What is asked."""
    section = command.add_argument_group("work")
    add = section.add_argument
    add(
        "--num-prompts",
        type=positive,
        default=num_prompts,
        metavar="N",
        help=f"requests (default: {num_prompts})",
    )
    add("--dataset-name", choices=DATASETS, default="random", help="(default: random)")
    add("--dataset-path", type=Path, metavar="FILE", help="of sharegpt: a JSON file")
    for name, default, text in (
        ("--random-input-len", random_len[0], "tokens of a prompt"),
        ("--random-output-len", random_len[1], "tokens of an answer"),
    ):
        add(name, type=positive, default=default, metavar="N", help=f"{text} (default: {default})")
    add(
        "--random-prefix-len",
        type=whole,
        default=0,
        metavar="N",
        help="tokens before these that all prompts share (default: 0)",
    )
    add(
        "--random-range-ratio",
        type=share,
        default=0.0,
        metavar="R",
        help="lengths are drawn between 1 - R and 1 + R of those given (default: 0)",
    )
    add(
        "--random-vocab-size",
        type=positive,
        metavar="N",
        help="token ids are drawn below this (default: 1000 over HTTP, else the whole vocabulary)",
    )
    add(
        "--sharegpt-output-len",
        type=positive,
        metavar="N",
        help="tokens of an answer, instead of as many as the file's own answer has",
    )


def add_json(command: argparse.ArgumentParser) -> None:
    """How the result is shown."""
    command.add_argument("--json", action="store_true", help="print one JSON line, no table")


def add_roofline(command: argparse.ArgumentParser) -> None:
    """What the GPU can do, where `roofline.CHIPS` does not know or should not be believed."""
    add = command.add_argument
    add(
        "--memory-tb-per-s",
        type=positive_number,
        metavar="X",
        help="memory bandwidth for the roofline (default: by the GPU's name)",
    )
    add(
        "--tflops",
        type=positive_number,
        metavar="X",
        help="matrix products for the roofline, bf16 (default: by the GPU's name)",
    )


def checked(text: str, value: float, allowed: bool, says: str) -> float:
    """`value`. Raises ArgumentTypeError, which argparse shows beside the flag's name."""
    if not allowed:
        raise argparse.ArgumentTypeError(f"{text} is not {says}")
    return value


def positive(text: str) -> int:
    """An integer from 1 on."""
    return int(checked(text, int(text), int(text) >= 1, "at least 1"))


def whole(text: str) -> int:
    """An integer from 0 on."""
    return int(checked(text, int(text), int(text) >= 0, "at least 0"))


def positive_number(text: str) -> float:
    """A finite number above 0."""
    value = float(text)
    return checked(text, value, 0 < value < math.inf, "a number above 0")


def positive_or_zero(text: str) -> float:
    """A finite number from 0 on."""
    value = float(text)
    return checked(text, value, 0 <= value < math.inf, "a number from 0 on")


def rate(text: str) -> float:
    """Requests a second: above 0, or inf."""
    value = float(text)
    return checked(text, value, value > 0, "a rate above 0, or inf")


def share(text: str) -> float:
    """From 0 up to, not including, 1."""
    value = float(text)
    return checked(text, value, 0 <= value < 1, "from 0 to below 1")


def names(text: str) -> list[str]:
    """Latencies by name, separated by commas."""
    found = text.split(",")
    if unknown := [name for name in found if name not in LATENCIES]:
        raise argparse.ArgumentTypeError(
            f"there is no {', '.join(unknown)}; there are {', '.join(LATENCIES)}"
        )
    return found


def percentiles(text: str) -> list[float]:
    """Numbers from 0 to 100, separated by commas."""
    found = [float(part) for part in text.split(",")]
    if any(not 0 <= part <= 100 for part in found):
        raise argparse.ArgumentTypeError(f"{text}: percentiles are from 0 to 100")
    return found
