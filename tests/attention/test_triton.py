"""Which backend a device gets. What the kernels compute: tests/kernels/interpreted_paged.py, in
Triton's interpreter, and tests/kernels/test_paged_gpu.py, on a GPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pagedserve.attention import backends
from pagedserve.attention.torch import TorchAttention

ROOT = Path(__file__).parents[2]
GPU = SimpleNamespace(name="gpu", torch=torch.device("cuda"), is_gpu=True)


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton")
def test_a_gpu_gets_our_kernels_and_torch_behind_them() -> None:
    names = [make.name for make in backends(GPU)]
    assert names == ["triton", "torch"]


def test_a_gpu_without_triton_gets_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert TorchAttention in backends(GPU)
    assert "triton" not in [make.name for make in backends(GPU)]


def test_a_cpu_never_imports_the_kernels() -> None:
    code = (
        "import sys\n"
        "from pagedserve.attention import backends\n"
        "from pagedserve.device import pick\n"
        "[make(pick('cpu')) for make in backends(pick('cpu'))]\n"
        "print(*sys.modules)"
    )
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    loaded = run.stdout.split()
    assert "pagedserve.attention.torch" in loaded
    assert "pagedserve.attention.triton" not in loaded
    assert "pagedserve.kernels.paged_decode" not in loaded
