"""What an exception in a step means."""

from __future__ import annotations

import gc
import logging
import weakref
from typing import Any, NoReturn

import pytest
import torch

from pagedserve.errors import PagedServeError, StepError
from pagedserve.worker.faults import NO_MEMORY, unless_broken

OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB. Process 4711 has 77 GiB in use."


class Device:
    """Of a worker: `lost` raises what a poisoned context does."""

    def __init__(self, *, lost: bool = False):
        self.lost = lost
        self.num_recovered = 0
        self.seen_alive: list[bool] = []
        self.watched: weakref.ref[Any] | None = None

    def recover(self) -> None:
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nat 0x7f00")
        self.num_recovered += 1
        if self.watched is not None:
            gc.collect()
            self.seen_alive.append(self.watched() is not None)


def failing(error: Exception) -> NoReturn:
    raise error


def run(device: Device, error: Exception) -> None:
    unless_broken(device, lambda: failing(error))


def test_what_does_not_fail_passes_through() -> None:
    device = Device()
    assert unless_broken(device, lambda: 7) == 7 and not device.num_recovered


@pytest.mark.parametrize(
    ("error", "message", "memory"),
    (
        (torch.OutOfMemoryError(OUT_OF_MEMORY), NO_MEMORY, True),
        (MemoryError(), NO_MEMORY, True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might"), NO_MEMORY, True),
        (ValueError("no such block size\nat line 3"), "ValueError: no such block size", False),
        (AssertionError(), "AssertionError", False),
        (RuntimeError("x" * 999), "RuntimeError: " + "x" * 200, False),
    ),
    ids=repr,
)
def test_a_sound_device_has_lost_a_step(error: Exception, message: str, memory: bool) -> None:
    device = Device()
    with pytest.raises(StepError) as caught:
        run(device, error)
    assert (caught.value.message, caught.value.memory) == (message, memory)
    assert device.num_recovered == 1


def test_a_device_that_does_not_answer_is_the_end_with_both_causes() -> None:
    with pytest.raises(PagedServeError, match="no kernel; then the device: .*illegal") as caught:
        run(Device(lost=True), ValueError("no kernel"))
    assert not isinstance(caught.value, StepError) and "0x7f00" not in str(caught.value)


def test_what_the_step_had_allocated_is_gone_before_the_device_recovers() -> None:
    device = Device()

    def work() -> None:
        taken = torch.zeros(10)
        device.watched = weakref.ref(taken)
        raise torch.OutOfMemoryError("more")

    with pytest.raises(StepError):
        unless_broken(device, work)
    assert device.seen_alive == [False]


def test_the_log_has_the_traceback_but_for_want_of_memory(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "pagedserve"):
        for error in (ValueError("no kernel"), torch.OutOfMemoryError("more")):
            with pytest.raises(StepError):
                run(Device(), error)
    assert [record.exc_info is not None for record in caplog.records][0]
    assert "no kernel" in caplog.text and not caplog.records[1].exc_info
