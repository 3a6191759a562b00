"""Triton kernels on the CPU: each `interpreted_*.py` here, in a process with Triton's interpreter.

The interpreter is chosen by an environment variable before triton is imported, for a whole process.
It is right in float32 only (its bfloat16 products are not), and takes time for every program, so
shapes are tiny and odd.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted(Path(__file__).parent.glob("interpreted_*.py"))


def test_there_are_some() -> None:
    assert FILES


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_kernels_are_right_in_the_interpreter(file: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2]
    )
    assert run.returncode == 0, run.stdout + run.stderr
