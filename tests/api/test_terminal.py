"""Standard output that takes no more ends a command in one line, over the toy engine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.api.serving import ROOT

RUN = """
import functools, sys
import pagedserve.llm
from pagedserve.cli import main
from pagedserve.engine.client import EngineClient
pagedserve.llm.EngineClient = functools.partial(EngineClient, "tests.api.toy_engine")
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", ["generate", "version"])
def test_a_full_disk_is_one_line_and_status_1(command: str, checkpoint: Path) -> None:
    arguments = [command]
    if command == "generate":
        arguments += ["hello", "--model", str(checkpoint), "--max-tokens", "4"]
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [sys.executable, "-c", RUN, *arguments],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert run.returncode == 1
    lines = [line for line in run.stderr.splitlines() if " s  " not in line]
    assert lines == ["pagedserve: cannot write to standard output: No space left on device"]


def test_a_reader_that_has_enough_is_no_complaint() -> None:
    run = subprocess.run(
        f"{sys.executable} -c 'import time; time.sleep(1); from pagedserve.cli import say; "
        'import pagedserve.cli, sys; sys.exit(pagedserve.cli.main(["version"]))\' | true',
        shell=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.stderr == ""
