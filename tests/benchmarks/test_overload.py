"""benchmarks/overload.py on a tiny shape: the engine dies once and no stream fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import overload as script

from tests.benchmarks.test_serve import TINY


def test_streams_outlive_the_engine_on_a_cache_too_small(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    flags = ["--seconds", "3", "--streams", "12", "--blocks", "300", "--processes", "1"]
    done = subprocess.run(
        [sys.executable, str(script.__file__), *flags, "--shape", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert (found["failed"], found["failed_before"], found["out_of_memory"]) == (0, 0, 0)
    assert (found["restarts"], found["tracebacks"]) == (1, 0)
    assert found["cause"] == ["the engine process was killed by SIGKILL"]
    assert found["completed"] >= 12 and found["killed_after_s"] > 0
