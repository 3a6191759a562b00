"""`bench throughput` and `latency` through the command line: the demo model, and the toy engine."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pagedserve.cli import main
from pagedserve.commands.bench import offline
from pagedserve.config import DEMO_MODEL
from pagedserve.engine.channel import Ready
from pagedserve.engine.client import EngineClient
from pagedserve.errors import PagedServeError
from tests.text.building import byte_level, write_checkpoint

Bench = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Bench:
    """Run a command with --json: its status and its line."""

    def run(*flags: str) -> tuple[int, dict[str, Any]]:
        status = main(["bench", *flags, "--json"])
        (line,) = capsys.readouterr().out.splitlines()
        return status, json.loads(line)

    return run


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A model that the toy engine serves."""
    client = functools.partial(EngineClient, "tests.api.toy_engine")
    monkeypatch.setattr(offline, "EngineClient", client)
    return str(write_checkpoint(tmp_path / "checkpoint", byte_level()))


def test_throughput_of_the_demo_model(bench: Bench) -> None:
    status, line = bench(
        "throughput", "--num-prompts", "5", "--random-input-len", "30", "--random-output-len",
        "6", "--random-range-ratio", "0.5", "--seed", "3",
        "--tflops", "1", "--memory-tb-per-s", "1",
    )  # fmt: skip
    assert status == 0
    assert (line["benchmark"], line["model"], line["seed"]) == ("throughput", DEMO_MODEL, 3)
    assert (line["completed"], line["failed"]) == (5, 0)
    assert 5 * 15 <= line["input_tokens"] <= 5 * 45 and 5 * 3 <= line["output_tokens"] <= 5 * 9
    assert line["random_vocab_size"] == 2048
    assert (line["device"], line["dtype"]) == ("cpu", "float32")
    assert line["torch"] and line["pagedserve"] and line["python"]
    assert 0 < line["roofline"]["fraction"] < 1 and line["roofline"]["source"] == "given"


def test_latency_of_the_demo_model(bench: Bench) -> None:
    status, line = bench(
        "latency", "--input-len", "12", "--output-len", "5", "--batch-size", "3", "--num-iters",
        "2", "--num-iters-warmup", "1",
    )  # fmt: skip
    assert status == 0
    assert (line["completed"], line["input_tokens"], line["output_tokens"]) == (6, 72, 30)
    assert line["batch_ms"]["p50"] >= line["e2e_ms"]["p50"] > line["ttft_ms"]["p50"] > 0
    assert "roofline" not in line  # nothing is known of a CPU


def test_the_table_is_for_people(toy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "throughput", "--model", toy, "--num-prompts", "2"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^completed +2$", shown, re.M)
    assert re.search(r"^ttft_ms +mean [\d.]+ · p50 ", shown, re.M)


def test_a_file_of_conversations_is_tokenised(toy: str, bench: Bench, tmp_path: Path) -> None:
    file = tmp_path / "conversations.json"
    said = [{"from": "human", "value": "the cat"}, {"from": "gpt", "value": "hello world"}]
    file.write_text(json.dumps([{"conversations": said}] * 2))
    dataset = ["--dataset-name", "sharegpt", "--dataset-path", str(file), "--num-prompts", "2"]
    status, line = bench("throughput", "--model", toy, *dataset)
    ids = {name: byte_level().encode(name).ids for name in ("the cat", "hello world")}
    assert status == 0
    assert line["input_tokens"] == 2 * len(ids["the cat"])
    assert line["output_tokens"] == 2 * len(ids["hello world"])


def test_an_engine_that_dies_fails_what_was_under_way(
    toy: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    poll, polls = EngineClient.poll, []

    def kill_later(client: EngineClient, timeout: float | None = 0.0) -> None:
        polls.append(client.num_live)
        if polls.count(3) == 5:
            os.kill(client.pid, signal.SIGKILL)
        poll(client, timeout)

    monkeypatch.setattr(EngineClient, "poll", kill_later)
    status, line = bench(
        "throughput", "--model", toy, "--num-prompts", "3", "--random-output-len", "1000"
    )
    assert (status, line["completed"], line["failed"]) == (1, 0, 3)
    ((cause, count),) = line["errors"].items()
    assert count == 3 and "engine" in cause
    assert "roofline" not in line


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["throughput", "--random-input-len", "3000"], "maximum context length"),
        (["latency", "--output-len", "3000"], "maximum context length"),
        (["throughput", "--random-vocab-size", "9999999"], "the vocabulary is 0 to"),
        (["throughput", "--dataset-name", "sharegpt"], "needs --dataset-path"),
        (["latency", "--tflops", "9"], "give --memory-tb-per-s and --tflops both"),
        (["latency", "--model", "/nowhere"], "there is no directory /nowhere"),
        (["throughput", "--block-size", "0"], "block_size must be at least 1"),
    ],
)
def test_what_cannot_run_is_one_line_and_status_1(
    toy: str, flags: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = [] if "--model" in flags else ["--model", toy]
    assert main(["bench", *flags, *model]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines()[-1].startswith("pagedserve: ") and says in shown.err


def ready(device: str) -> Ready:
    return Ready(100, 100, 100, 16, 8, [], device, "bfloat16", 1.0)


def test_a_known_gpus_figures_can_be_given_one_by_one() -> None:
    config, own = offline.split({"memory_tb_per_s": 3.0, "tflops": None})
    found = offline.roofline(config, Path(DEMO_MODEL), ready("NVIDIA H200"), own)
    assert found is not None
    assert (found.chip.bytes_per_s, found.chip.flops_per_s) == (3e12, 790e12)
    assert (found.chip.source, found.item_bytes) == ("given", 2)
    with pytest.raises(PagedServeError, match="nothing is known of Abacus"):
        offline.roofline(config, Path(DEMO_MODEL), ready("Abacus"), own)
