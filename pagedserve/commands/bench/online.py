"""`pagedserve bench serve`: load on a running OpenAI-compatible server, as its clients see it."""

from __future__ import annotations

import http.client
import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pagedserve.commands.bench import machine
from pagedserve.commands.bench.client import Job, message_of
from pagedserve.commands.bench.clients import Target, drive
from pagedserve.commands.bench.figures import LATENCIES, Outcome, show, summary
from pagedserve.commands.bench.work import Ask, arrivals, asks_of, counts_tokens, facts_of
from pagedserve.config import ModelConfig, api_key_from_environment
from pagedserve.errors import PagedServeError
from pagedserve.models.telling import tell_nobody

USUAL_VOCAB_SIZE = 1000  # every vocabulary has these ids
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
PROBE_SECONDS = 30


def run_serve(options: dict[str, Any]) -> int:
    """The command."""
    key = options["api_key"] or api_key_from_environment()
    target = Target(options["base_url"], key, options["timeout"])
    options["random_vocab_size"] = options["random_vocab_size"] or USUAL_VOCAB_SIZE
    asks = work_of(options, options["num_prompts"], options["seed"])
    model = options["model"] or first_model(target)
    if count := options["num_warmups"]:
        warm_up(target, options, model, count)
    times = arrivals(len(asks), options["request_rate"], options["seed"])
    outcomes = drive(
        target,
        jobs_of(asks, options, model, times),
        concurrency=options["max_concurrency"],
        processes=options["client_processes"],
    )
    figures = summary(outcomes, options["metric_percentiles"])
    for name in set(LATENCIES) - set(options["percentile_metrics"]):
        del figures[f"{name}_ms"]
    line = {"benchmark": "serve", **asked(options, model), **figures, **where(target)}
    show(line, as_json=options["json"])
    if options["save_result"] or options["result_filename"]:
        save(options["result_filename"], line, outcomes)
    return 1 if figures["failed"] else 0


def work_of(options: dict[str, Any], count: int, seed: int) -> list[Ask]:
    """What is asked; a tokenizer is loaded only where it has to count."""
    encode = None
    if counts_tokens(options) and options["tokenizer"] is not None:
        from pagedserve.api import checkpoint

        source = ModelConfig(model=options["tokenizer"], load_format="dummy")  # without weights
        tokenizer = checkpoint.load(source, tell_nobody).tokenizer
        assert tokenizer is not None, "only skip_tokenizer_init leaves it out"
        encode = tokenizer.encode
    return asks_of(options, count, seed, encode=encode)


def jobs_of(
    asks: Sequence[Ask], options: dict[str, Any], model: str, times: Sequence[float]
) -> list[Job]:
    """Requests of the API."""
    return [
        Job(
            at,
            completion_body(
                model,
                ask,
                ignore_eos=options["ignore_eos"],
                temperature=options["temperature"],
            ),
            ask.num_tokens if options["ignore_eos"] else None,
        )
        for ask, at in zip(asks, times, strict=True)
    ]


def completion_body(
    model: str, ask: Ask, *, ignore_eos: bool = True, temperature: float = 0
) -> bytes:
    """A streamed completion. `ignore_eos` is no field of OpenAI's: sent only where wanted."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": ask.prompt,
        "max_tokens": ask.num_tokens,
        "temperature": temperature,
    }
    if ignore_eos:
        body["ignore_eos"] = True
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    return json.dumps(body).encode()


def warm_up(target: Target, options: dict[str, Any], model: str, count: int) -> None:
    """Requests that are not measured. Raises PagedServeError where none is answered."""
    asks = work_of(options, count, options["seed"] + 1)
    jobs = jobs_of(asks, options, model, [0.0] * count)
    outcomes = drive(target, jobs, concurrency=options["max_concurrency"], processes=1)
    if all(each.error for each in outcomes):
        raise PagedServeError(f"no warm-up request was answered: {outcomes[0].error}")


def first_model(target: Target) -> str:
    """The first model that the server lists. Raises PagedServeError where it lists none."""
    answer = get(target, "/v1/models")
    try:
        return str(answer["data"][0]["id"])
    except (KeyError, IndexError, TypeError) as error:
        raise PagedServeError(
            f"{target.root}/v1/models lists no model; name one with --model"
        ) from error


def get(target: Target, path: str) -> Any:
    """A JSON answer. Raises PagedServeError where there is none."""
    request = urllib.request.Request(target.root + path)
    if target.api_key is not None:
        request.add_header("Authorization", f"Bearer {target.api_key}")
    try:
        with urllib.request.urlopen(request, timeout=PROBE_SECONDS) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            text = message_of(error.read(4096))
        raise PagedServeError(f"{target.root}{path}: HTTP {error.code}: {text}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise PagedServeError(
            f"no answer from {target.root} ({reason}); is the server running? "
            "Start one with `pagedserve serve`, or give --base-url"
        ) from error
    except ValueError as error:
        raise PagedServeError(f"{target.root}{path} is no URL of an API: {error}") from error


def asked(options: dict[str, Any], model: str) -> dict[str, Any]:
    """What was asked, for the line."""
    rate = options["request_rate"]
    found = {
        "model": model,
        "request_rate": "inf" if rate == float("inf") else rate,
        "max_concurrency": options["max_concurrency"],
        "ignore_eos": options["ignore_eos"],
        "temperature": options["temperature"],
        "seed": options["seed"],
    }
    return found | facts_of(options)


def where(target: Target) -> dict[str, Any]:
    """Who was asked and from where. The GPU is known only of a server on this machine."""
    try:
        server = get(target, "/version")
    except PagedServeError:  # not all servers say it
        server = None
    local = urlsplit(target.root).hostname in LOCAL_HOSTS
    return {
        "base_url": target.root,
        "server": server.get("version") if isinstance(server, dict) else None,
        "gpu": machine.gpu_name() if local else None,
        **machine.versions(),
    }


def save(path: Path | None, line: dict[str, Any], outcomes: Sequence[Outcome]) -> None:
    """Write the figures and every request. Raises PagedServeError."""
    path = path or Path(time.strftime("bench-serve-%Y%m%d-%H%M%S.json"))
    requests = [
        {
            "ttft_s": round(each.at[0] - each.began, 6) if each.at else None,
            "e2e_s": round(each.at[-1] - each.began, 6) if each.at else None,
            "input_tokens": each.num_prompt,
            "output_tokens": each.tokens,
            "status": each.status,
            "error": each.error or None,
        }
        for each in outcomes
    ]
    try:
        path.write_text(json.dumps({**line, "requests": requests}, indent=1) + "\n")
    except OSError as error:
        raise PagedServeError(f"cannot write {path}: {error.strerror or error}") from error
    print(f"written to {path}", file=sys.stderr)
