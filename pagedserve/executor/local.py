"""One worker, in the engine's own process."""

from __future__ import annotations

from typing import cast

from pagedserve.config import Config
from pagedserve.executor.base import Ticket
from pagedserve.models.telling import Tell
from pagedserve.step import EngineInfo, Step, StepOutput
from pagedserve.worker.faults import unless_broken
from pagedserve.worker.start import Launched, Worker, start


class LocalExecutor:
    """Runs every step on one Runner; the simplest `base.Executor`."""

    def __init__(self, config: Config, on_progress: Tell):
        self._config = config
        self._on_progress = on_progress
        self._worker: Worker | None = None

    def start(self) -> EngineInfo:
        """Load the model and allocate the cache. Raises StartupError."""
        self._worker = start(self._config, self._on_progress)
        return self._worker.info

    def launch(self, step: Step) -> Ticket:
        """Enqueue the step's forward and sampling on the device."""
        worker = self._started
        return Ticket(unless_broken(worker, lambda: worker.launch(step)))

    def result(self, ticket: Ticket) -> StepOutput:
        """Wait for the step's tokens."""
        return unless_broken(self._started, cast(Launched, ticket).result)

    @property
    def _started(self) -> Worker:
        assert self._worker is not None, "start() comes first"
        return self._worker

    def stop(self) -> None:
        """Let go of the model and the cache."""
        self._worker = None
