"""What holds for every test: one thread, fixed seeds, GPU tests only where there is a GPU.

torch is not imported here: tests of the engine and of the text room run without it.
"""

from __future__ import annotations

import os
import random
import sys

import pytest
from hypothesis import settings

# torch reads these when it is imported, here or in an engine process that a test starts. One thread
# sums in one order, and the tests share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

# The same examples in every run; no deadline, because a busy machine is no failure.
settings.register_profile("pagedserve", derandomize=True, deadline=None)
settings.load_profile("pagedserve")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where torch finds no GPU; torch is imported only to ask."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not gpu_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def gpu_available() -> bool:
    """True where torch can use a CUDA device."""
    import torch

    return torch.cuda.is_available()


def pytest_runtest_setup() -> None:
    """Seed the global generators before each test, those of libraries only once imported."""
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
