"""On a GPU: what a rehearsal has compiled is all that steps of any load need."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from pagedserve.config import Config
from pagedserve.worker.start import start
from tests.checkpoints import tiny_checkpoint
from tests.worker.soak import soak

pytestmark = pytest.mark.gpu

FAMILIES = {
    "llama": {},
    "gemma2": {"head_dim": 16, "sliding_window": 8},
    "mixtral": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_after_the_start_no_kernel_is_compiled(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton")
    directory = tiny_checkpoint(family, tmp_path / "model", **FAMILIES[family])
    compiled: list[str] = []

    def note(*, src: Any, cache_hit: bool, **_: Any) -> None:
        compiled.append(src.name)

    forget_kernels()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "kernels"))
    monkeypatch.setattr(triton.knobs.compilation, "listener", note)
    config = Config.from_options(
        {
            "model": str(directory),
            "dtype": "bfloat16",
            "device": "cuda",
            "block_size": 16,
            "max_num_seqs": 40,
            "max_num_batched_tokens": 300,
            "max_model_len": 200,
            "num_gpu_blocks_override": 400,
        }
    )
    worker = start(config, lambda phase, detail="", *_: None)
    before = len(compiled)
    assert before > 10
    soak(worker, block_size=16, steps=150, depth=2)
    assert compiled[before:] == []


def forget_kernels() -> None:
    """Those that other tests have compiled in this process."""
    from triton.runtime.jit import JITFunction

    for name, module in list(sys.modules.items()):
        if name.startswith("pagedserve.kernels."):
            for kernel in vars(module).values():
                if isinstance(kernel, JITFunction):
                    kernel.device_caches.clear()
