"""Start-up: seconds from `pagedserve serve` to the first HTTP answer, and to readiness.

Each run starts a fresh server of the demo model and polls it. The first run, which warms the page
cache and compiles the CPU kernels where that was never done, is reported apart.

    python benchmarks/startup.py [--runs 5] [--model DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request

from pagedserve.config import DEMO_MODEL
from pagedserve.version import __version__


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--model", default=DEMO_MODEL)
    args = parser.parse_args()
    first, *rest = [start(args.model) for _ in range(args.runs + 1)]
    print(
        json.dumps(
            {
                "benchmark": "startup",
                "first_answer_s": [round(answer, 2) for answer, _ in rest],
                "ready_s": [round(ready, 2) for _, ready in rest],
                "median_first_answer_s": round(statistics.median(a for a, _ in rest), 2),
                "median_ready_s": round(statistics.median(r for _, r in rest), 2),
                "first_run_ready_s": round(first[1], 2),
                "bars": {"first_answer_s": 2, "ready_s": 8},
                "cores": os.cpu_count(),
                "pagedserve": __version__,
                "python": platform.python_version(),
            }
        )
    )


def start(model: str) -> tuple[float, float]:
    """Seconds to the first answer of any status, and to a 200 of /readyz."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "pagedserve", "serve", model, "--port", str(port)],
        stdout=subprocess.DEVNULL,
    )
    answered = None
    try:
        while True:
            status = poll(f"http://127.0.0.1:{port}/readyz")
            now = time.perf_counter() - began
            if status is not None and answered is None:
                answered = now
            if status == 200 and answered is not None:
                return answered, now
            assert process.poll() is None, "the server ended"
            time.sleep(0.01)
    finally:
        process.terminate()
        process.wait(60)


def poll(url: str) -> int | None:
    """The status, or None while nobody listens."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (urllib.error.URLError, ConnectionError):
        return None


if __name__ == "__main__":
    main()
