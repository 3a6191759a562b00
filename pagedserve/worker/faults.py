"""What an exception in a step means: the step's end, or the engine's.

The device is asked. One that still answers has lost nothing but the step: memory ran out, a kernel
could not be compiled or launched. One that does not is of no use to this process any more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

from pagedserve.errors import PagedServeError, StepError

log = logging.getLogger("pagedserve")

Result = TypeVar("Result")
MAX_CAUSE_CHARS = 200
NO_MEMORY = "the device has no memory for it"


class Recovers(Protocol):
    """What `unless_broken` asks of a worker; see `start.Worker`."""

    def recover(self) -> None: ...


def unless_broken(worker: Recovers, work: Callable[[], Result]) -> Result:
    """What `work` gives. Raises StepError where it broke off and the device answers, else
    PagedServeError."""
    try:
        return work()
    except Exception as error:
        failure = StepError(cause_of(error), memory=is_memory(error))
        log.warning("a step broke off: %s", failure.message, exc_info=not failure.memory)
    # Only now: the exception's frames held what the step had allocated.
    try:
        worker.recover()
    except Exception as error:
        cause = f"{failure.message}; then the device: {cause_of(error)}"
        raise PagedServeError(cause, code="device_lost") from None
    raise failure


def is_memory(error: Exception) -> bool:
    """Whether less at a time, or later, might have done. The driver's own lack has no class."""
    no_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return no_memory or (isinstance(error, RuntimeError) and "out of memory" in str(error))


def cause_of(error: Exception) -> str:
    """One line for people, without the addresses and process ids that torch adds in the next."""
    if is_memory(error):
        return NO_MEMORY
    lines = str(error).strip().splitlines()
    return (
        f"{type(error).__name__}: {lines[0][:MAX_CAUSE_CHARS]}" if lines else type(error).__name__
    )
