"""Measures the demo model's bars through a running server, over plain HTTP.

Prompts are rendered here, so that only `/v1/completions` is asked of the server. Prints one JSON
line; the exit status is 1 when a bar is missed and 2 when the server did not answer.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "train_demo"))

from bars import BARS_SEED, Case, draw_cases, measure  # noqa: E402

TIMEOUT_SECONDS = 300


def main() -> int:
    args = parse_args()
    try:
        model = args.model or request(f"{args.url}/v1/models")["data"][0]["id"]
        cases = draw_cases(args.cases, seed=args.seed)
        began = time.monotonic()
        with ThreadPoolExecutor(args.concurrency) as pool:
            texts = list(pool.map(lambda case: complete(args.url, model, case), cases))
    except urllib.error.HTTPError as error:
        print(f"the server answered {error.code}: {error.read(500)!r}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"no answer from {args.url}: {error}", file=sys.stderr)
        return 2
    bars = measure(cases, texts)
    line = {
        "benchmark": "demo_bars",
        "model": model,
        "bars": bars,
        "seed": args.seed,
        "concurrency": args.concurrency,
        "seconds": round(time.monotonic() - began, 2),
        "python": platform.python_version(),
    }
    print(json.dumps(line))
    if args.verbose:
        show_missed(cases, texts)
    return 0 if all(result["met"] for result in bars.values()) else 1


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the demo model's bars.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="", help="default: the first that the server lists")
    parser.add_argument("--cases", type=int, default=200, help="cases a bar")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--seed", type=int, default=BARS_SEED)
    parser.add_argument("--verbose", action="store_true", help="show missed cases on stderr")
    return parser.parse_args()


def complete(url: str, model: str, case: Case) -> str:
    """The greedy completion of the case's prompt."""
    body = {
        "model": model,
        "prompt": case.prompt,
        "max_tokens": case.max_tokens,
        "temperature": 0,
    }
    if case.stop:
        body["stop"] = [case.stop]
    return str(request(f"{url}/v1/completions", body)["choices"][0]["text"])


def request(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """GET, or POST when there is a body; the answer as JSON."""
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=TIMEOUT_SECONDS) as answer:
        return dict(json.load(answer))


def show_missed(cases: list[Case], texts: list[str]) -> None:
    for case, text in zip(cases, texts, strict=True):
        if not case.passes(text):
            print(f"{case.bar}: {case.prompt[-200:]!r} -> {text!r}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
