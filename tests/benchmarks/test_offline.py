"""benchmarks/offline.py on a tiny shape, and the share of the roofline that it gives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import offline as script
import pytest

from pagedserve.commands.bench.roofline import Roofline, chip_named, read_spec
from tests.benchmarks.test_serve import TINY


def test_a_line_is_printed_for_every_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    command = [sys.executable, script.__file__, "B2", "C100", "--repetitions", "1"]
    done = subprocess.run(
        [*command, "--shape", str(tmp_path), "--", "--max-model-len", "1000", "--seed", "4"],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(each["benchmark"], each["unit"]) for each in lines] == [
        ("B2", "ms between tokens"),
        ("C100", "ms to the token"),
    ]
    assert all(each["value"] > 0 and each["seed"] == 4 and each["torch"] for each in lines)
    assert all("times_vllm" not in each for each in lines)


@pytest.mark.parametrize(
    ("name", "value", "share"),
    [("A", 36_600, 1.0), ("B1", 0.575, 0.5), ("B256", 4.78, 1.0), ("C8192", 37.8, 0.5)],
)
def test_the_share_of_the_roofline_is_of_the_measured_time(
    name: str, value: float, share: float
) -> None:
    spec, chip = read_spec(script.SHAPES / "qwen3-0.6b"), chip_named("NVIDIA H200")
    assert spec is not None and chip is not None
    found = script.roofline_fraction(Roofline(spec, chip), name, value, 256)
    assert found == pytest.approx(share, rel=0.02)
