"""What the engine asks of whoever computes its steps. No torch here: the engine imports it."""

from __future__ import annotations

from typing import Any, NewType, Protocol

from pagedserve.step import EngineInfo, Step, StepOutput

Ticket = NewType("Ticket", object)
"""A launched step whose result is still on its way; only its executor looks inside."""


class Executor(Protocol):
    """One worker or many behind four verbs. Results are asked for in the order of launches."""

    def start(self) -> EngineInfo:
        """Load the model and allocate the cache. Raises StartupError."""
        ...

    def launch(self, step: Step) -> Any:
        """Start a step; returns its Ticket without waiting for the device.

        Raises StepError where it broke off and the device is sound: what it took is given back, and
        a step may be launched. Any other error is the end of the engine.
        """
        ...

    def result(self, ticket: Ticket) -> StepOutput:
        """Wait for a launched step. Raises StepError as `launch`, also of those behind it."""
        ...

    def stop(self) -> None:
        """Let go of the device."""
        ...
