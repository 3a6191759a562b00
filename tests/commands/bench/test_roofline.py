"""The arithmetic against tables that were computed, and measured, elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import workload
from pagedserve.commands.bench.roofline import CHIPS, Roofline, chip_named, read_spec

SHAPES = Path(__file__).parents[3] / "benchmarks" / "shapes"
GPU = "NVIDIA H200"


def roofline(name: str, item_bytes: int = 2) -> Roofline:
    spec, chip = read_spec(SHAPES / name), chip_named(GPU)
    assert spec is not None and chip is not None
    return Roofline(spec, chip, item_bytes)


@pytest.mark.parametrize(
    ("shape", "rows", "context", "milliseconds"),
    [  # 4.4 TB/s, 790 TFLOP/s, bf16, to three digits
        ("llama-3.1-8b", 1, 1024, 3.44),
        ("llama-3.1-8b", 1, 4096, 3.53),
        ("llama-3.1-8b", 32, 1024, 4.44),
        ("llama-3.1-8b", 256, 512, 9.18),
        ("llama-3.1-8b", 256, 1024, 13.1),
        ("llama-3.1-8b", 256, 4096, 36.5),
        ("qwen3-0.6b", 1, 1024, 0.30),
        ("qwen3-0.6b", 32, 1024, 1.14),
        ("qwen3-0.6b", 256, 512, 3.93),
        ("qwen3-0.6b", 256, 1024, 7.35),
    ],
)
def test_a_decode_step_takes_what_the_table_says(
    shape: str, rows: int, context: int, milliseconds: float
) -> None:
    found = 1e3 * roofline(shape).decode_seconds(rows, context)
    half_a_digit = 0.5 * 10 ** (-1 if milliseconds > 10 else -2)
    assert abs(found - milliseconds) <= half_a_digit * 1.1


@pytest.mark.parametrize(
    ("shape", "gigabytes", "kv_bytes"),
    [("llama-3.1-8b", 15.01, 131072), ("qwen3-0.6b", 1.19, 114688)],
)
def test_a_model_weighs_what_the_table_says(shape: str, gigabytes: float, kv_bytes: int) -> None:
    model = roofline(shape)
    assert 2e-9 * model.weight_numbers(1) == pytest.approx(gigabytes, abs=0.005)
    assert 2 * model.kv_numbers(1) == kv_bytes


@pytest.mark.parametrize(
    ("tokens", "milliseconds", "tflops"),
    [(1024, 28.64, 509), (8192, 219.6, 601), (32768, 1209.7, 611)],
)
def test_products_of_a_prompt_are_counted_as_in_the_comparison(
    tokens: int, milliseconds: float, tflops: int
) -> None:
    found = roofline("llama-3.1-8b").prefill_flops(tokens) / (1e-3 * milliseconds)
    assert round(1e-12 * found) == tflops


def test_the_whole_offline_workload_takes_what_the_table_says() -> None:
    lengths = [(len(prompt), length) for prompt, length in workload.offline()]
    seconds = roofline("qwen3-0.6b").work_seconds(lengths, 256)
    assert seconds == pytest.approx(3.66, rel=0.01)


def test_one_token_reads_its_own_experts_and_many_read_all() -> None:
    model = roofline("qwen3-30b-a3b")
    expert = 3 * 2048 * 768
    outside = model.dense + model.head
    assert model.weight_numbers(1) - outside == pytest.approx(48 * 8 * expert)
    assert model.weight_numbers(10_000) - outside == pytest.approx(48 * 128 * expert)
    drawn = model.weight_numbers(2) - outside  # 8 of 128, and 8 · 120 / 128 more
    assert drawn == pytest.approx(48 * expert * (8 + 8 * 120 / 128))


def test_latent_attention_caches_one_latent_a_token() -> None:
    model = roofline("deepseek-v2-lite")
    assert model.kv_numbers(1) == 27 * (512 + 64)
    parameters = model.active + model.head
    assert 1e-9 * parameters == pytest.approx(2.45, abs=0.02)  # with the embedding 2.66


def test_a_window_bounds_what_is_read(tmp_path: Path) -> None:
    config: dict[str, Any] = json.loads((SHAPES / "mixtral-8x7b" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"sliding_window": 100}))
    spec = read_spec(tmp_path)
    assert spec is not None
    model = Roofline(spec, CHIPS["H200"])
    assert model.kv_numbers(5000) == model.kv_numbers(100) == 100 * 32 * 2 * 8 * 128


def test_float32_takes_twice_the_bytes() -> None:
    half, full = roofline("qwen3-0.6b"), roofline("qwen3-0.6b", 4)
    assert full.decode_seconds(1, 1000) == pytest.approx(2 * half.decode_seconds(1, 1000))


def test_a_prompt_is_bound_by_weights_or_by_products() -> None:
    model = roofline("llama-3.1-8b")
    assert model.prefill_seconds(1) == pytest.approx(2 * model.weight_numbers(1) / 4.4e12)
    assert model.prefill_seconds(8192) == pytest.approx(model.prefill_flops(8192) / 790e12)


def test_devices_and_models_without_figures_have_no_roofline(tmp_path: Path) -> None:
    assert chip_named("cpu") is None and chip_named(None) is None
    assert chip_named("NVIDIA H100 80GB HBM3") == CHIPS["H100 80GB HBM3"]
    assert chip_named("NVIDIA L40S") == CHIPS["L40S"]  # and not L4's
    (tmp_path / "config.json").write_text('{"architectures": ["SomethingElse"]}')
    assert read_spec(tmp_path) is None
