"""The context of the first GPU is made early where there is one, and given back."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import pytest

from pagedserve.kernels.driver import EarlyContext


class FakeDriver:
    """Answers as libcuda does; the call of the name `broken` fails."""

    def __init__(self, broken: str = ""):
        self.broken, self.calls, self.threads = broken, [], set()  # type: ignore[var-annotated]

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            self.threads.add(threading.current_thread())
            return 100 if name == self.broken else 0

        return call


MADE = ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"]


@pytest.mark.parametrize("broken", ("", *MADE))
def test_a_context_is_made_in_a_thread_and_given_back_once(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = FakeDriver(broken)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    context = EarlyContext()
    context._making.join()
    assert driver.calls == (MADE[: MADE.index(broken) + 1] if broken else MADE)
    assert driver.threads == {context._making}
    context.give_back()
    context.give_back()
    assert driver.calls.count("cuDevicePrimaryCtxRelease_v2") == (0 if broken else 1)


def test_without_a_driver_nothing_happens() -> None:
    EarlyContext("libthere_is_no_such_library.so.1").give_back()
