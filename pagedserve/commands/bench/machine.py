"""Where a benchmark ran: versions and the GPU, for the line that it prints."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from typing import Any

from pagedserve.version import __version__

PACKAGES = ("torch", "triton")
ASK_TORCH = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
ASK_SECONDS = 60


def versions() -> dict[str, Any]:
    """Ours, the interpreter's, and those of what computes; None for what is not installed."""
    return {
        "pagedserve": __version__,
        "python": platform.python_version(),
        **{name: version_of(name) for name in PACKAGES},
        "cores": os.cpu_count(),
    }


def version_of(package: str) -> str | None:
    """An installed package's version, without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpu_name() -> str | None:
    """This machine's first GPU. torch is asked in a process of its own, which ends at once."""
    try:
        found = subprocess.run(
            [sys.executable, "-c", ASK_TORCH], capture_output=True, text=True, timeout=ASK_SECONDS
        )
    except subprocess.TimeoutExpired:
        return None
    return found.stdout.strip() or None
