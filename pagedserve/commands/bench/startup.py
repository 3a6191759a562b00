"""`pagedserve bench startup`: seconds from starting a server to its first answer and to readiness.

The first start, which warms the page cache and may compile kernels, is shown apart. A start that
fails is counted, and the last lines of its server are shown.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from pagedserve.commands.bench import machine
from pagedserve.commands.bench.figures import show
from pagedserve.config import Config, each_option

POLL_SECONDS = 0.01
STOP_SECONDS = 60
LINES_SHOWN = 5
LOG_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Start:
    """Seconds to the first HTTP answer of any status, and to a 200 of /readyz.

    `error` is empty where the server became ready; it ends with what the server last said.
    `phases`: of the engine's start, by name, how many seconds each lasted.
    """

    first_answer_s: float | None = None
    ready_s: float | None = None
    error: str = ""
    phases: dict[str, float] = field(default_factory=dict)


def run_startup(options: dict[str, Any]) -> int:
    """The command."""
    runs, timeout, as_json = (options.pop(name) for name in ("runs", "timeout", "json"))
    config = Config.from_options(options)
    starts = []
    for number in range(runs + 1):
        starts.append(start(serve_flags(options), timeout))
        print(f"start {number}: {said(starts[-1])}", file=sys.stderr)
    line = {
        "benchmark": "startup",
        "model": config.model.model,
        **figures(starts),
        "gpu": machine.gpu_name(),
        "seed": config.model.seed,
        **machine.versions(),
    }
    show(line, as_json=as_json)
    return 1 if line["failed"] else 0


def serve_flags(options: Mapping[str, Any]) -> list[str]:
    """`options` as flags of `pagedserve serve`."""
    kinds = {option.name: option for _, option in each_option()}
    flags: list[str] = []
    for name, value in options.items():
        assert name in kinds, name
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags.append(f"--{flag}={value}")
    return flags


def figures(starts: Sequence[Start]) -> dict[str, Any]:
    """The fields of the line. The first start is not among the others."""
    first, *rest = starts
    good = [each for each in rest if not each.error]
    found: dict[str, Any] = {
        "runs": len(rest),
        "failed": sum(bool(each.error) for each in starts),
        "errors": dict(Counter(each.error for each in starts if each.error)),
        "first_run_ready_s": rounded(first.ready_s),
        "first_run_phases_s": first.phases,
    }
    for name in ("first_answer_s", "ready_s"):
        values = [getattr(each, name) for each in good]
        found[f"median_{name}"] = rounded(statistics.median(values)) if values else None
        found[name] = [rounded(value) for value in values]
    found["median_phases_s"] = {
        name: rounded(statistics.median(each.phases.get(name, 0.0) for each in good))
        for name in (good[0].phases if good else ())
    }
    return found


def start(flags: Sequence[str], timeout: float, env: Mapping[str, str] | None = None) -> Start:
    """Start `pagedserve serve FLAGS` on a free port, wait until it is ready, and stop it."""
    port = free_port()
    with tempfile.TemporaryFile() as log:
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "pagedserve", "serve", *flags, "--port", str(port)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=None if env is None else dict(env),
        )
        try:
            return watch(process, f"http://127.0.0.1:{port}", log, timeout, began)
        finally:
            stop(process)


def watch(
    process: subprocess.Popen[bytes], server: str, log: IO[bytes], timeout: float, began: float
) -> Start:
    """Poll a server that was started at `began` until it is ready, or ends, or takes too long."""
    answered = None
    while True:
        status = poll(f"{server}/readyz")
        now = time.perf_counter() - began
        if status is not None and answered is None:
            answered = now
        if status == 200:
            return Start(answered, now, phases=phases(server))
        if (code := process.poll()) is not None:
            return Start(answered, error=f"the server ended with status {code}: {last_words(log)}")
        if now > timeout:
            return Start(answered, error=f"not ready within {timeout:g} s: {last_words(log)}")
        time.sleep(POLL_SECONDS)


def phases(server: str) -> dict[str, float]:
    """Seconds of each phase of the start, as a server that is ready tells them; one with keys tells
    nobody without."""
    with urllib.request.urlopen(f"{server}/health", timeout=5) as response:
        told = json.load(response).get("phases", [])
    return {each["phase"]: each["lasted_seconds"] for each in told}


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server: politely, then for certain."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def poll(url: str) -> int | None:
    """The status, or None while nobody listens."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return None


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def last_words(log: IO[bytes]) -> str:
    """The last lines of what a server wrote."""
    # Not by seeking: the server writes at the same place of the file.
    lines = os.pread(log.fileno(), LOG_BYTES, 0).decode(errors="replace").split("\n")
    return " | ".join([line.strip() for line in lines if line.strip()][-LINES_SHOWN:])


def said(one: Start) -> str:
    """A start, for people."""
    return one.error or f"answers after {one.first_answer_s:.2f} s, ready after {one.ready_s:.2f} s"


def rounded(seconds: float | None) -> float | None:
    """Hundredths of a second."""
    return None if seconds is None else round(seconds, 2)
