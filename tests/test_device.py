"""The CPU as a device; the GPU where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pagedserve import device
from pagedserve.errors import StartupError


def test_the_cpu_computes_in_float32_and_knows_its_memory() -> None:
    cpu = device.pick("cpu")
    assert (cpu.name, cpu.torch.type) == ("cpu", "cpu")
    assert cpu.default_dtype(torch.bfloat16) == torch.float32
    memory = cpu.memory()
    assert 0 < memory.free <= memory.total


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "limit").write_text("1000000\n")
    (tmp_path / "usage").write_text("400000\n")
    files = ((str(tmp_path / "limit"), str(tmp_path / "usage")),)
    monkeypatch.setattr(device, "CGROUP_MEMORY", files)
    assert device.pick("cpu").memory() == device.Memory(free=600_000, total=1_000_000)
    (tmp_path / "limit").write_text("max\n")
    assert device.pick("cpu").memory().total > 1_000_000


def test_a_device_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StartupError, match="'tpu'"):
        device.pick("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(StartupError, match="--device cpu"):
        device.pick("cuda")
    assert device.pick("auto").name == "cpu"


@pytest.mark.gpu
def test_the_gpu_keeps_the_checkpoints_dtype() -> None:
    gpu = device.pick("auto")
    assert gpu.torch.type == "cuda"
    assert gpu.default_dtype(torch.bfloat16) == torch.bfloat16
    assert 0 < gpu.memory().free <= gpu.memory().total
