"""How long a running server takes to refuse bad requests, idle and under load.

python benchmarks/refusals.py --url http://127.0.0.1:8000 [--repeats 20]
"""

from __future__ import annotations

import argparse
import http.client
import json
import platform
import statistics
import threading
import time
import urllib.parse
from typing import Any

from pagedserve.version import __version__

GOOD: dict[str, Any] = {"prompt": "Once", "max_tokens": 8}


def bad_bodies() -> dict[str, bytes]:
    """Name of the fault → body."""
    changes: dict[str, dict[str, Any]] = {
        "wrong type": {"temperature": "hot"},
        "empty prompt": {"prompt": ""},
        "prompt too long": {"prompt": "word " * 20_000},
        "token outside the vocabulary": {"prompt": [1, 10**9]},
        "n = 10^9": {"n": 10**9},
        "1 MB stop list": {"stop": ["x" * 20] * 40_000},
        "unknown model": {"model": "gpt-none"},
        "unknown field": {"frobnicate": 1},
    }
    bodies = {name: json.dumps(GOOD | change).encode() for name, change in changes.items()}
    bodies["NaN temperature"] = json.dumps(GOOD | {"temperature": float("nan")}).encode()
    bodies["broken JSON"] = b'{"prompt": "Once", '
    return bodies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    host = urllib.parse.urlparse(args.url).netloc
    results = {}
    for state in ("idle", "loaded"):
        stop = threading.Event()
        load = [threading.Thread(target=keep_busy, args=(host, stop)) for _ in range(8)]
        if state == "loaded":
            for thread in load:
                thread.start()
            time.sleep(1)
        results[state] = {
            name: round(statistics.median(refuse(host, body) for _ in range(args.repeats)), 2)
            for name, body in bad_bodies().items()
        }
        stop.set()
        for thread in load:
            if thread.ident:
                thread.join()
    slowest = {state: max(times.values()) for state, times in results.items()}
    print(
        json.dumps(
            {
                "benchmark": "refusals",
                "slowest_median_ms": slowest,
                "median_ms": results,
                "bar_ms": 50,
                "pagedserve": __version__,
                "python": platform.python_version(),
            }
        )
    )


def refuse(host: str, body: bytes) -> float:
    """Milliseconds to a small 4xx."""
    connection = http.client.HTTPConnection(host, timeout=30)
    began = time.perf_counter()
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer = response.read()
    elapsed = 1e3 * (time.perf_counter() - began)
    connection.close()
    assert 400 <= response.status < 500 and len(answer) < 4096, (response.status, answer[:200])
    return elapsed


def keep_busy(host: str, stop: threading.Event) -> None:
    """Complete one request after the other until told to stop."""
    body = json.dumps(GOOD | {"max_tokens": 200, "ignore_eos": True}).encode()
    while not stop.is_set():
        connection = http.client.HTTPConnection(host, timeout=60)
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        connection.getresponse().read()
        connection.close()


if __name__ == "__main__":
    main()
