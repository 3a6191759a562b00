"""Others take memory while we start: it is planned again, with less."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pagedserve.config import Config
from pagedserve.device import Cpu, Memory
from pagedserve.errors import StartupError
from pagedserve.models.loading import LoadedModel, load_model
from pagedserve.worker import kv_cache, start
from pagedserve.worker.start import ATTEMPTS, fit
from tests.checkpoints import tiny_checkpoint

MIB = 1 << 20


class Shrinking(Cpu):
    """A device on which there is less at every look."""

    def __init__(self, *free_mib: int):
        self.looks = list(free_mib)
        self.given_back = 0
        self.held: int = 0

    def memory(self) -> Memory:
        free = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        return Memory(free * MIB, 1000 * MIB)

    def give_back(self) -> None:
        self.given_back += 1


@pytest.fixture
def model(tmp_path: Path) -> LoadedModel:
    tiny_checkpoint("llama", tmp_path, num_hidden_layers=1, vocab_size=97)
    return load_model(tmp_path, device=Cpu())


def config(**options: Any) -> Config:
    return Config.from_options({"device": "cpu", "max_num_seqs": 4000, **options})


def room_for(num_bytes: int, error: Exception, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Caches of more than `num_bytes` cannot be had; the sizes of those that were asked for."""
    asked: list[int] = []
    real = kv_cache.zeros

    def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        asked.append(shape[0] * shape[1] * dtype.itemsize)
        if asked[-1] > num_bytes:
            raise error
        return real(shape, dtype, device)

    monkeypatch.setattr(kv_cache, "zeros", zeros)
    return asked


def silent(phase: str, detail: str, done: int = 0, total: int = 0, /) -> None:
    pass


@pytest.mark.parametrize(
    "error",
    (torch.OutOfMemoryError("no"), MemoryError("no"), RuntimeError("out of memory")),
    ids=repr,
)
def test_what_others_took_in_between_is_left_to_them(
    error: Exception,
    model: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked = room_for(20 * MIB, error, monkeypatch)
    device = Shrinking(400, 300, 60)
    with caplog.at_level(logging.WARNING, "pagedserve"):
        worker = fit(config(), device, model, silent)
    assert len(asked) == 3 == device.given_back + 1
    assert asked == sorted(asked, reverse=True) and asked[-1] <= 60 * MIB / 4
    assert worker.info.num_blocks * kv_cache.block_bytes(model.spec, 16, model.dtype) == asked[-1]
    assert caplog.text.count("could not be allocated") == 2


def test_each_attempt_leaves_more_alone(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = room_for(0, MemoryError("no"), monkeypatch)
    with pytest.raises(StartupError, match=r"no memory: what was planned .*weights .*KV cache"):
        fit(config(), Shrinking(400), model, silent)
    assert len(asked) == ATTEMPTS and len(set(asked)) == ATTEMPTS
    assert asked == sorted(asked, reverse=True)


def test_a_size_that_was_asked_for_is_not_made_smaller(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = room_for(0, MemoryError("no"), monkeypatch)
    with pytest.raises(StartupError, match="lower .*--num-gpu-blocks-override"):
        fit(config(num_gpu_blocks_override=7), Shrinking(400), model, silent)
    assert len(asked) == 1


def test_first_steps_without_memory_are_an_attempt_too(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    warm_up: Callable[[Any], None] = start.Runner.warm_up

    def short(runner: Any) -> None:
        calls.append(runner.info.num_blocks)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("no")
        warm_up(runner)

    monkeypatch.setattr(start.Runner, "warm_up", short)
    device = Shrinking(100)
    worker = fit(config(), device, model, silent)
    assert calls == [worker.info.num_blocks + (calls[0] - calls[1]), worker.info.num_blocks]
    assert calls[0] > calls[1] and device.given_back == 1


def test_what_is_no_lack_of_memory_ends_the_start(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(runner: Any) -> None:
        raise ValueError("no kernel")

    monkeypatch.setattr(start.Runner, "warm_up", broken)
    device = Shrinking(100)
    with pytest.raises(ValueError, match="no kernel"):
        fit(config(), device, model, silent)
    assert device.given_back == 0


def test_weights_that_do_not_fit_are_an_error_that_says_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*given: Any) -> LoadedModel:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(start, "load_configured", short)
    monkeypatch.setattr(start, "pick", lambda wanted: Shrinking(300))
    with pytest.raises(StartupError, match=r"weights on cpu: 300.0 MiB are free.*pagedserve plan"):
        start.start(config(model=str(tmp_path)), silent)


def test_the_line_of_the_plan_is_told(model: LoadedModel) -> None:
    told: list[tuple[str, str]] = []

    def tell(phase: str, detail: str, done: int = 0, total: int = 0, /) -> None:
        told.append((phase, detail))

    small = replace(model, max_model_len=64)
    worker = fit(config(max_num_seqs=3), Shrinking(900), small, tell)
    [detail] = [detail for phase, detail in told if phase == "allocate KV cache"]
    assert detail.startswith(f"{worker.info.num_blocks} blocks: ") and "KV cache" in detail
    assert worker.info.num_blocks == 3 * 64 // 16
