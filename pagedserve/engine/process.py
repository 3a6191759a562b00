"""The engine process: `python -m pagedserve.engine.process FD`.

Reads the configuration from the channel, has the executor load the model, reports every phase on
the way, runs the loop, and when it must die says why, once.
"""

from __future__ import annotations

import signal
import socket
import sys
import threading
import time
import traceback

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
from pagedserve.errors import PagedServeError, shorten
from pagedserve.kernels import extension

STARTED = time.monotonic()


def main(fd: int) -> int:
    """Serve the channel on file descriptor `fd`; the exit status."""
    # The API process owns Ctrl-C: it drains, then tells us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=fd))
    try:
        serve(channel)
    except ChannelClosed:
        return 0  # the API process is gone: nobody to serve, nobody to tell
    except Exception as error:
        if not isinstance(error, PagedServeError):
            traceback.print_exc()
        report_death(channel, error)
        return 1
    return 0


def serve(channel: Channel) -> None:
    """Start up, report ready, run until told to stop."""
    report(channel, "import torch")
    # A first start compiles the CPU's kernels: on another core, while torch is imported here.
    threading.Thread(target=extension.load, daemon=True).start()
    # Imported while the API process still resolves the model: the two take about as long.
    from pagedserve.executor import local

    config = receive_config(channel)
    if config is None:
        return
    executor = local.LocalExecutor(config, lambda phase, detail: report(channel, phase, detail))
    info = executor.start()
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
        )
    )
    overlap = config.scheduler.async_scheduling
    depth = 2 if (info.asynchronous if overlap is None else overlap) else 1
    try:
        Engine(scheduler, executor, channel, depth=depth).run()
    finally:
        executor.stop()


def receive_config(channel: Channel) -> Config | None:
    """Wait for the configuration; None when told to stop before it came."""
    while True:
        for message in channel.receive(None):
            match message:
                case Configure(options=options):
                    return Config.from_options(options)
                case Control(name="shutdown"):
                    return None


def report(channel: Channel, phase: str, detail: str = "") -> None:
    """Tell the API process which start-up phase begins."""
    channel.send(Progress(phase, time.monotonic() - STARTED, detail))


def report_death(channel: Channel, error: Exception) -> None:
    """Send the cause of death, as far as the socket still takes it."""
    cause = str(error) if isinstance(error, PagedServeError) else f"{type(error).__name__}: {error}"
    try:
        channel.send(Dead(shorten(cause)))
    except ChannelClosed:
        return


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
