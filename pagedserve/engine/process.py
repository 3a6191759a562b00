"""The engine process: `python -m pagedserve.engine.process FD PARENT`.

Reads the configuration from the channel, has the executor load the model, reports every phase on
the way, runs the loop, and when it must die says why, once.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import signal
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING

from pagedserve import logs
from pagedserve.config import Config
from pagedserve.engine.block_pool import BlockPool
from pagedserve.engine.channel import (
    Channel,
    ChannelClosed,
    Configure,
    Control,
    Dead,
    Progress,
    Ready,
)
from pagedserve.engine.loop import Engine
from pagedserve.engine.scheduler import Scheduler
from pagedserve.errors import PagedServeError, StartupError, shorten
from pagedserve.kernels import extension
from pagedserve.kernels.driver import EarlyContext

if TYPE_CHECKING:
    from pagedserve.executor.local import LocalExecutor

log = logging.getLogger("pagedserve")

STARTED = time.monotonic()
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
GPU_STALL_SECONDS = 120.0
CPU_STALL_SECONDS = 600.0


def main(fd: int, parent: int = 0) -> int:
    """Serve the channel on file descriptor `fd`; the exit status.

    `parent`: process whose death also kills this one (0: none, the closed channel ends it).
    """
    if parent and not die_with(parent):
        return 0
    # The API process owns Ctrl-C: it drains, then tells us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=fd))
    with logs.to_standard_error():
        return to_the_end(channel)


def to_the_end(channel: Channel) -> int:
    """Serve `channel`; the exit status."""
    try:
        serve(channel)
    except ChannelClosed:
        return 0  # the API process is gone: nobody to serve, nobody to tell
    except Exception as error:
        if not isinstance(error, PagedServeError):
            log.exception("the engine cannot go on")
        report_death(channel, error)
        return 1
    return 0


def serve(channel: Channel) -> None:
    """Start up, report ready, run until told to stop."""
    report(channel, "import torch")
    context = EarlyContext()
    # A first start compiles the CPU's kernels: on another core, while torch is imported here.
    threading.Thread(target=extension.load, daemon=True).start()
    # Imported while the API process still resolves the model: the two take about as long.
    executor_class = import_executor()
    report(channel, "read the configuration")
    config = receive_config(channel)
    if config is None:
        return
    executor = executor_class(config, functools.partial(report, channel))
    info = executor.start()
    if not info.asynchronous:
        context.give_back()
    scheduler = Scheduler(
        BlockPool(info.num_blocks, caching=config.cache.enable_prefix_caching),
        block_size=config.cache.block_size,
        max_num_seqs=info.max_num_seqs,
        max_num_batched_tokens=info.max_num_batched_tokens,
        eos_token_ids=frozenset(info.eos_token_ids),
    )
    channel.send(
        Ready(
            vocab_size=info.vocab_size,
            max_model_len=info.max_model_len,
            num_blocks=info.num_blocks,
            block_size=config.cache.block_size,
            max_num_seqs=info.max_num_seqs,
            eos_token_ids=info.eos_token_ids,
            device=info.device,
            dtype=info.dtype,
            seconds=time.monotonic() - STARTED,
            stall_seconds=stall_seconds(config, on_gpu=info.asynchronous),
        )
    )
    overlap = config.scheduler.async_scheduling
    if overlap is None:
        overlap = info.asynchronous and not config.scheduler.enforce_eager
    depth = 2 if overlap else 1
    try:
        Engine(scheduler, executor, channel, depth=depth).run()
    finally:
        executor.stop()


def stall_seconds(config: Config, *, on_gpu: bool) -> float:
    """How long a step may take before this engine counts as stalled.

    A step of a large model takes a minute or more on a few CPU cores; on a GPU nothing does, but
    the first run of a step may compile its kernels.
    """
    asked = config.server.engine_stall_timeout
    if asked is not None:
        return asked
    return GPU_STALL_SECONDS if on_gpu else CPU_STALL_SECONDS


def die_with(parent: int) -> bool:
    """Have the kernel kill this process when `parent` dies; False if it is dead already.

    The closed channel tells us too, but only while we run: a stopped engine would stay for ever and
    hold its memory. The signal comes when the *thread* that forked us ends, so `parent` is given
    only where that was the main thread (`client.lasting_parent`).
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # After the call: a parent that died before it sends no signal any more.
    return os.getppid() == parent


def import_executor() -> type[LocalExecutor]:
    """The executor, and with it torch. Raises StartupError where torch is missing or broken."""
    try:
        from pagedserve.executor.local import LocalExecutor
    except (ImportError, OSError) as error:  # OSError: a shared library that cannot be loaded
        if "torch" in sys.modules:  # it is there, so something else is not
            raise
        reason = " ".join(str(error).split())
        raise StartupError(f"torch cannot be imported: {reason}; install torch>=2.11") from error
    return LocalExecutor


def receive_config(channel: Channel) -> Config | None:
    """Wait for the configuration; None when told to stop before it came."""
    while True:
        for message in channel.receive(None):
            match message:
                case Configure(options=options):
                    return Config.from_options(options)
                case Control(name="shutdown"):
                    return None


def report(channel: Channel, phase: str, detail: str = "", done: int = 0, total: int = 0) -> None:
    """Tell the API process which start-up phase begins, or how far it is."""
    channel.send(Progress(phase, time.monotonic() - STARTED, detail, done, total))


def report_death(channel: Channel, error: Exception) -> None:
    """Send the cause of death, as far as the socket still takes it."""
    cause = str(error) if isinstance(error, PagedServeError) else f"{type(error).__name__}: {error}"
    try:
        channel.send(Dead(shorten(cause)))
    except ChannelClosed:
        return


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
