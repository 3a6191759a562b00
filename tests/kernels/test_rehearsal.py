"""In a rehearsal kernels are compiled for what they would be launched with; none is launched."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from pagedserve.kernels.rehearsal import rehearsal  # noqa: E402


@triton.jit
def double_kernel(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, 2 * tl.load(x + at, mask=at < n, other=0.0), mask=at < n)


@triton.jit
def wrong_kernel(x, out, n, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), tl.no_such_thing(x))


class NoGpu:
    """What a driver tells of its GPU, without one: it has nothing to launch with.

    `asked`: threads that wanted to.
    """

    def __init__(self) -> None:
        self.asked: set[str] = set()

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        self.asked.add(threading.current_thread().name)
        raise OSError("there is no GPU")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture(autouse=True)
def no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NoGpu]:
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    found = NoGpu()
    monkeypatch.setattr(driver, "_active", found)
    yield found
    for kernel in (double_kernel, wrong_kernel):
        kernel.device_caches.clear()


def launch(kernel: Any, dtype: torch.dtype, n: int, block: int = 32) -> torch.Tensor:
    x, out = torch.ones(n, dtype=dtype), torch.full((n,), 7, dtype=dtype)
    kernel[(triton.cdiv(n, block),)](x, out, n, BLOCK=block)
    return out


def compiled(kernel: Any) -> list[Any]:
    return list(kernel.device_caches[0][0].values())


def test_every_variant_is_compiled_once_and_outputs_are_left_alone(no_gpu: NoGpu) -> None:
    with rehearsal():
        for _ in range(3):
            for dtype in (torch.float32, torch.bfloat16):
                for n in (64, 65):  # a multiple of 16, and not
                    out = launch(double_kernel, dtype, n)
                    assert torch.equal(out, torch.full_like(out, 7))
        launch(double_kernel, torch.float32, 64, block=64)
    assert all(name.startswith("compile") for name in no_gpu.asked) and no_gpu.asked
    kernels = compiled(double_kernel)
    assert len(kernels) == 5 and all(kernel.asm["cubin"] for kernel in kernels)


def test_what_was_compiled_is_launched_without_the_compiler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with rehearsal():
        launch(double_kernel, torch.float32, 64)
    (kernel,) = compiled(double_kernel)
    launched: list[tuple[int, ...]] = []
    monkeypatch.setattr(kernel, "module", "loaded onto a GPU")
    monkeypatch.setattr(kernel, "_run", lambda *args: launched.append(args[:3]))
    launch(double_kernel, torch.float32, 64)
    launch(double_kernel, torch.float32, 128)
    assert launched == [(2, 1, 1), (4, 1, 1)] and compiled(double_kernel) == [kernel]


def test_what_cannot_be_compiled_is_said_when_it_is_launched_and_stops_no_other() -> None:
    before = JITFunction.run
    with rehearsal():
        launch(wrong_kernel, torch.float32, 64)
        launch(double_kernel, torch.float32, 64)
    assert len(compiled(double_kernel)) == 1
    with pytest.raises(triton.CompilationError):
        launch(wrong_kernel, torch.float32, 64)
    with pytest.raises(KeyError, match="mine"), rehearsal():
        raise KeyError("mine")
    assert JITFunction.run is before
    with pytest.raises(OSError, match="there is no GPU"):
        launch(double_kernel, torch.float32, 64)
