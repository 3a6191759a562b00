"""benchmarks/serve.py on a tiny shape, and what it makes of figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import serve as script
import workload
from _checkpoint import SHAPES, shape_directory, write_checkpoint
from tokenizers import Tokenizer

SCRIPT = Path(script.__file__)
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "vocab_size": workload.HIGHEST_TOKEN + 1,
}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return tmp_path


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def test_rows_of_a_server_that_it_starts(tiny: Path) -> None:
    done = run("one", "prefix", "--serve", "--max-num-seqs 4", "--shape", str(tiny),
               "--requests", "2", "--processes", "1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(each["row"], each["completed"], each["failed"]) for each in lines] == [
        ("one", 2, 0),
        ("prefix", 2, 0),
    ]
    assert [each["output_tokens"] for each in lines] == [2 * 256, 2 * 64]
    assert [each["input_tokens"] for each in lines] == [2 * 1024, 2 * 2176]
    assert all(each["flags"] == "--max-num-seqs 4" and each["torch"] for each in lines)
    assert all("times_vllm" not in each for each in lines)  # another shape, other counts
    # Every token has text, so every token is a piece: gaps and times per token are the same.
    assert lines[0]["itl_ms"]["mean"] == pytest.approx(lines[0]["tpot_ms"]["mean"], rel=1e-3)


def test_a_server_that_cannot_start_is_one_line(tiny: Path) -> None:
    done = run("one", "--serve", "--dtype int3", "--shape", str(tiny), "--requests", "1")
    assert (done.returncode, done.stdout) == (1, "")
    assert "serve.py: the server ended with status 2" in done.stderr and "int3" in done.stderr


def test_no_server_is_one_line() -> None:
    done = run("--url", "http://127.0.0.1:1")
    assert (done.returncode, done.stdout) == (1, "")
    assert "serve.py: no answer from http://127.0.0.1:1" in done.stderr
    assert run("two").returncode == 2


def figures(**changes: Any) -> dict[str, Any]:
    spread = {"mean": 10.0, "p99": 20.0}
    line = {"row": "one", "requests": 16, "failed": 0, "duration_s": 21.0,
            "output_tokens_per_s": 7000.0, "ttft_ms": spread, "tpot_ms": spread,
            "itl_ms": spread}  # fmt: skip
    return line | changes


def test_ratios_are_above_one_where_ours_is_better() -> None:
    found = script.times_vllm(figures(), {"output_tokens_per_s": 3500, "itl_ms.p99": 30.0})
    assert found == {"output_tokens_per_s": 2.0, "itl_ms.p99": 1.5}
    nothing = figures(output_tokens_per_s=None, itl_ms=None)
    assert script.times_vllm(nothing, {"output_tokens_per_s": 1, "itl_ms.p99": 1}) == {
        "output_tokens_per_s": None,
        "itl_ms.p99": None,
    }


def test_the_roofline_is_given_where_it_is_defined() -> None:
    shape, gpu = SHAPES / "llama-3.1-8b", "NVIDIA H200"
    step = script.roofline_fraction(figures(tpot_ms={"mean": 4.87}), shape, gpu)
    assert step == pytest.approx(3.446 / 4.87, abs=0.001)
    closed = figures(row="closed", requests=512)
    assert 0.3 < script.roofline_fraction(closed, shape, gpu) < 1
    assert script.roofline_fraction(figures(row="rate"), shape, gpu) is None
    assert script.roofline_fraction(figures(failed=1), shape, gpu) is None
    assert script.roofline_fraction(figures(), shape, None) is None


def test_every_id_of_a_made_tokenizer_is_a_word(tiny: Path, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    write_checkpoint(tiny, directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == TINY["vocab_size"]
    assert tokenizer.decode([0, 9999, 10000]) == " w0 w9999 w10000"


def test_a_shape_that_is_not_there_is_told_with_those_that_are() -> None:
    assert shape_directory("qwen3-0.6b") == SHAPES / "qwen3-0.6b"
    with pytest.raises(SystemExit, match="there is no shape nothing; there are .*qwen3-0.6b"):
        shape_directory("nothing")
