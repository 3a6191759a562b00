"""Triton kernels compiled before they are launched, as many at a time as there are processors.

A kernel is compiled at its first launch, for the types and constants that it is launched with, in
a second or so. Only a launch says what they are; so a step is gone through as if it were computed,
and every launch in it hands its kernel to a pool of threads instead. The compiler lets others run
while it works. What is on disk already is read in the same way.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

from triton import AsyncCompileMode
from triton.runtime.jit import JITFunction

MAX_THREADS = 32


@contextmanager
def rehearsal() -> Iterator[None]:
    """Inside, in this thread, kernels are compiled and not launched; outputs stay as they are.

    At the end all are compiled, but those that cannot be: launching one will say so.
    """
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return launch(self, *args, grid=grid, warmup=True, **options)

    threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))
    JITFunction.run = compile_only
    try:
        # With errors it would leave itself switched on.
        with (
            Pool(threads, "compile") as pool,
            AsyncCompileMode(pool, ignore_errors=True),
        ):
            yield
    finally:
        JITFunction.run = launch


class Pool(ThreadPoolExecutor):
    """Makes what it is given to compile ready to be launched."""

    def submit(self, compile: Callable[[], Any], /, *_: Any, **__: Any) -> Future[Any]:
        return super().submit(made_ready, compile)


def made_ready(compile: Callable[[], Any]) -> Any:
    """A compiled kernel, loaded onto the GPU and with its launcher.

    Triton makes those at the first launch, a launcher with a C compiler where it was never made.
    """
    kernel = compile()
    with suppress(Exception):  # launching it says the same
        kernel.run  # noqa: B018  # making it is what it is read for
    return kernel
