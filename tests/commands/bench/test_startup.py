"""`bench startup` through the command line: servers that become ready, and some that do not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pagedserve.cli import main, parser
from pagedserve.commands.bench import machine, startup
from pagedserve.commands.bench.startup import Start, figures, serve_flags


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch is not asked: that takes seconds."""
    monkeypatch.setattr(machine, "gpu_name", lambda: None)


def test_starts_of_the_demo_model(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--runs", "1", "--max-model-len", "64", "--no-enable-prefix-caching"]
    assert main(["bench", "startup", "--json", *flags]) == 0
    line = json.loads(capsys.readouterr().out)
    assert (line["benchmark"], line["runs"], line["failed"]) == ("startup", 1, 0)
    assert 0 < line["first_answer_s"][0] <= line["ready_s"][0] == line["median_ready_s"]
    assert line["first_run_ready_s"] > 0 and line["torch"] and line["seed"] == 0
    for phases in (line["first_run_phases_s"], line["median_phases_s"]):
        assert list(phases)[0] == "import torch" and list(phases)[-1] == "warm up"
    assert 0 < sum(line["median_phases_s"].values()) < line["ready_s"][0]


def test_a_server_that_cannot_start_is_counted_with_its_words(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["bench", "startup", "--runs", "1", "--model", str(tmp_path)]
    assert main([*command, "--json"]) == 1
    line = json.loads(capsys.readouterr().out)
    assert line["failed"] == 2 and line["ready_s"] == [] and line["median_ready_s"] is None
    assert all("the server ended with status 1" in each for each in line["errors"])
    assert all("config.json" in each for each in line["errors"])


def test_a_start_that_takes_too_long_is_a_failure_and_leaves_no_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen

    def note(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(real(*args, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", note)
    assert main(["bench", "startup", "--runs", "1", "--timeout", "0.05", "--json"]) == 1
    line = json.loads(capsys.readouterr().out)
    assert line["failed"] == 2
    assert all(each.startswith("not ready within 0.05 s") for each in line["errors"])
    assert len(started) == 2 and all(each.returncode is not None for each in started)


def test_a_bad_flag_starts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "startup", "--block-size", "0"]) == 1
    assert "block_size must be at least 1" in capsys.readouterr().err


def test_options_become_the_servers_flags_again() -> None:
    given = {
        "model": "somewhere",
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "gpu_memory_utilization": 0.5,
        "hf_overrides": '{"a": 1}',
    }
    options = vars(parser().parse_args(["serve", *serve_flags(given)]))
    assert {name: options[name] for name in given} == given


def test_the_first_start_stands_apart() -> None:
    starts = [Start(1.0, 9.0), Start(0.5, 2.0), Start(0.7, 4.0), Start(error="no"), Start(0.6, 3.0)]
    found = figures(starts)
    assert (found["runs"], found["failed"], found["errors"]) == (4, 1, {"no": 1})
    assert found["first_run_ready_s"] == 9.0
    assert found["ready_s"] == [2.0, 4.0, 3.0] and found["median_ready_s"] == 3.0
    assert found["median_first_answer_s"] == 0.6


def test_phases_are_those_of_the_starts_that_count() -> None:
    phases = [{"a": 9.0, "b": 9.0}, {"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 1.0}, {"a": 2.0}]
    found = figures([Start(1.0, 9.0, phases=each) for each in phases] + [Start(error="no")])
    assert found["first_run_phases_s"] == phases[0]
    assert found["median_phases_s"] == {"a": 2.0, "b": 1.0}
    assert figures([Start(error="no")] * 2)["median_phases_s"] == {}


def test_the_last_lines_of_a_server_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of one that writes a lot, or in another encoding."""
    real = subprocess.Popen
    script = (
        "import sys\nfor n in range(50): print(n)\nsys.stdout.buffer.write(b'\\xff!\\n')\nexit(7)"
    )

    def instead(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return real([sys.executable, "-c", script], **options)

    monkeypatch.setattr(subprocess, "Popen", instead)
    found = startup.start([], 30.0)
    assert found.error == "the server ended with status 7: 46 | 47 | 48 | 49 | \ufffd!"
