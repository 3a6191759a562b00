"""`pagedserve plan`: what the start would do, from config.json alone."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pagedserve import device
from pagedserve.cli import main
from pagedserve.config import Config
from pagedserve.device import Cpu, Memory
from pagedserve.models.loading import load_model
from pagedserve.worker.start import settle
from tests.checkpoints import tiny_checkpoint

SHAPES = Path(__file__).parents[2] / "benchmarks/shapes"
GIB = 1 << 30


def planned(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> Any:
    assert main(["plan", *arguments, "--json"]) == status
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("shape", "num_bytes", "per_token"),
    (
        ("llama-3.1-8b", 16_060_522_496, 2 * 32 * 8 * 128 * 2),
        ("qwen3-0.6b", 1_192_257_536, 2 * 28 * 8 * 128 * 2),
        ("deepseek-v2-lite", 31_419_784_192, 27 * (512 + 64) * 2),
    ),
)
def test_a_model_of_which_nothing_is_here_but_its_config(
    shape: str, num_bytes: int, per_token: int, capsys: pytest.CaptureFixture[str]
) -> None:
    found = planned(capsys, str(SHAPES / shape), "--gpu-memory", "140")
    assert found["fits"] and found["total_bytes"] == 140 * GIB
    assert sum(found["bytes"].values()) == 140 * GIB
    # Keys and values are rotated at load time; what else the model keeps is a few numbers.
    assert abs(found["bytes"]["weights"] - num_bytes) < num_bytes / 1000
    cache = found["kv_cache"]
    assert cache["bytes_per_token"] == per_token
    assert cache["num_tokens"] == cache["num_blocks"] * 16 >= found["max_model_len"]
    assert found["bytes"]["kv_cache"] == (cache["num_blocks"] + 1) * cache["block_bytes"]
    assert (found["max_num_seqs"], found["max_num_batched_tokens"]) == (256, 8192)
    assert found["notes"] == []


def test_a_smaller_gpu_lowers_what_nobody_asked_for_and_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = planned(capsys, str(SHAPES / "llama-3.1-8b"), "--gpu-memory", "19.5")
    assert found["max_num_batched_tokens"] < 8192 and found["max_model_len"] < 131072
    assert [note.split(" is ")[0] for note in found["notes"]] == [
        "--max-num-batched-tokens",
        "--max-num-seqs",
        "the context",
    ]


def test_what_does_not_fit_says_by_how_much_and_what_to_change(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [str(SHAPES / "llama-3.1-8b"), "--gpu-memory", "24", "--max-model-len", "100000"]
    found = planned(capsys, *arguments, status=1)
    assert found["fits"] is False
    assert re.search(r"100000 does not fit the KV cache: 7\.\d+ GiB are missing", found["error"])
    assert "ask for" in found["error"] and "weights 14.96 GiB" in found["error"]
    assert main(["plan", *arguments]) == 1
    assert found["error"] in capsys.readouterr().err


def test_the_table_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(SHAPES / "qwen3-0.6b"), "--gpu-memory", "80"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["80.00", "GiB", "a", "GPU", "of", "80", "GiB"]
    names = [line.split()[2] for line in lines[1 : lines.index("")]]
    assert names == ["others", "weights", "rows", "step", "graphs", "KV", "unused"]
    assert "a token takes 112 KiB of the KV cache" in lines[lines.index("") + 1]


def test_a_start_on_the_same_memory_settles_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_checkpoint("llama", tmp_path)
    full = Memory(3 * GIB, 4 * GIB)
    monkeypatch.setattr(device, "pick", lambda wanted: Whole(full))
    found = planned(capsys, str(tmp_path), "--max-num-seqs", "100")
    loaded = load_model(tmp_path, device=Cpu())
    # A CPU packs what it loads; the outline counts what the checkpoint's numbers take.
    left = replace(full, free=full.free - found["bytes"]["weights"])
    config = Config.from_options({"model": str(tmp_path), "max_num_seqs": 100})
    info = settle(config, Whole(left), loaded)
    assert found["kv_cache"]["num_blocks"] == info.num_blocks
    assert found["max_model_len"] == info.max_model_len
    assert found["max_num_batched_tokens"] == info.max_num_batched_tokens


class Whole(Cpu):
    """As full as is said."""

    def __init__(self, memory: Memory):
        self._memory = memory

    def memory(self) -> Memory:
        return self._memory


@pytest.mark.parametrize(
    ("arguments", "text"),
    (
        (["a", "--model", "b"], "give MODEL or --model, not both"),
        (["--gpu-memory", "0"], "--gpu-memory must be a number of GiB above 0, got 0"),
        (["--gpu-memory", "nan"], "--gpu-memory must be a number of GiB above 0, got nan"),
        (["/nothing/there"], "there is no directory /nothing/there"),
    ),
)
def test_wrong_usage_is_one_line(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments]) == 1
    assert text in capsys.readouterr().err


def test_a_model_that_only_its_start_can_measure_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_checkpoint("llama", tmp_path)
    found = planned(capsys, str(tmp_path), "--model-impl", "transformers", status=1)
    assert "modeling of transformers" in found["error"]


def test_a_model_larger_than_this_machine_is_planned_on_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = planned(capsys, str(SHAPES / "mixtral-8x7b"), "--gpu-memory", "141")
    assert found["bytes"]["weights"] > 90e9
    found = planned(capsys, str(SHAPES / "mixtral-8x7b"), "--gpu-memory", "80", status=1)
    assert re.search(r"the weights do not fit, 15\.\d+ GiB are missing", found["error"])
