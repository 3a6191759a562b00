"""A server over the toy engine, for tests: `python -m tests.api.serving OPTIONS_AS_JSON`."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]


class Server:
    """A started server; `url` is known as soon as it listens. A context manager."""

    def __init__(self, log: Path, **options: Any):
        self.log = log
        self._file = log.open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.api.serving", json.dumps({"port": 0, **options})],
            cwd=ROOT,
            stdout=self._file,
            stderr=subprocess.STDOUT,
        )
        self.started = time.monotonic()
        self.url = self._listening()
        self.http = httpx.Client(base_url=self.url, timeout=20)

    def _listening(self) -> str:
        while not (found := re.search(r"listening on (\S+)", self.output)):
            assert self.process.poll() is None, self.output
            assert time.monotonic() < self.started + 60, self.output
            time.sleep(0.01)
        return found[1]

    @property
    def output(self) -> str:
        """What it has written to the terminal."""
        return self.log.read_text()

    def until_ready(self) -> Server:
        """Wait for /readyz."""
        while self.http.get("/readyz").status_code != 200:
            assert time.monotonic() < self.started + 60, self.output
            time.sleep(0.02)
        return self

    def metric(self, name: str, **labels: str) -> float:
        """A figure of /metrics."""
        for line in self.http.get("/metrics").text.splitlines():
            key, _, value = line.rpartition(" ")
            if key.startswith(f"pagedserve:{name}{{") and all(
                f'{label}="{text}"' in key for label, text in labels.items()
            ):
                return float(value)
        raise AssertionError(f"no metric {name}")

    def wait_for(self, name: str, value: float) -> None:
        """Wait until a figure has `value`."""
        deadline = time.monotonic() + 30
        while (now := self.metric(name)) != value:
            assert time.monotonic() < deadline, f"{name} is {now}, not {value}"
            time.sleep(0.01)

    def wait_for_phase(self, phase: str) -> dict[str, Any]:
        """Wait until /readyz says `phase`; all that it says."""
        deadline = time.monotonic() + 30
        while (found := self.http.get("/readyz").json())["phase"] != phase:
            assert time.monotonic() < deadline, f"{found}\n{self.output}"
            time.sleep(0.01)
        return found

    def engine_pid(self) -> int:
        """The process id of its one child."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        (pid,) = map(int, children.split())
        return pid

    def signal(self, number: int = signal.SIGINT) -> None:
        """Send a signal to the server process."""
        self.process.send_signal(number)

    def exit_status(self, timeout: float = 60) -> int:
        """Wait for its end."""
        return self.process.wait(timeout)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._file.close()


def main() -> int:
    from pagedserve.api.server import run
    from pagedserve.cli import say
    from pagedserve.config import Config
    from pagedserve.errors import PagedServeError

    try:
        options = json.loads(sys.argv[1])
        return run(Config.from_options(options), say, engine_module="tests.api.toy_engine")
    except PagedServeError as error:
        print(f"pagedserve: {error.message}", flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
