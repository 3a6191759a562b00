"""The engine process on a device whose steps break off at their first attempt, in its first life.

`python -m tests.engine.broken_engine FD PARENT`; the file named by BROKEN_ENGINE_LIVES is made by
the first life, and tells later ones that they are.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from pagedserve.engine import process
from pagedserve.executor import local
from pagedserve.step import Step
from pagedserve.worker.start import Worker, start


class Breaking:
    """Stands for a worker."""

    def __init__(self, worker: Worker):
        self._worker = worker
        self._seen: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._worker, name)

    def launch(self, step: Step) -> Any:
        launched = self._worker.launch(step)
        if step.id not in self._seen:
            self._seen.add(step.id)
            raise torch.OutOfMemoryError("of it")
        return launched


def main() -> int:
    lives = Path(os.environ["BROKEN_ENGINE_LIVES"])
    if not lives.exists():
        lives.touch()
        local.start = lambda *given: Breaking(start(*given))  # type: ignore[assignment, return-value]
    return process.main(*map(int, sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
