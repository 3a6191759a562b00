"""One engine process from its start to its end, with the API process's end of the channel.

The room knows processes and signals; what is said over the channel is the client's business.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from pagedserve.config import environment_without_keys
from pagedserve.engine.channel import AnyMessage, Channel, Message

EXIT_SECONDS = 2.0  # between the end of a channel and the end of its process


class EngineProcess:
    """`python -m module FD PARENT`, started when this is made."""

    def __init__(self, module: str):
        self.channel, theirs = Channel.pair()
        # A session of its own: Ctrl-C in the terminal reaches the API process only, which drains.
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno()), str(lasting_parent())],
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env=environment_without_keys(),
            )
        except BaseException:
            self.channel.close()
            raise
        finally:
            theirs.close()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def exited(self) -> bool:
        """True once the process is gone, and with it the memory that it held."""
        return self._process.poll() is not None

    @property
    def stopped(self) -> bool:
        """True where the kernel says that a signal (SIGSTOP) has stopped it. Linux only."""
        try:
            status = Path(f"/proc/{self.pid}/stat").read_text()
        except OSError:
            return False
        return status.rpartition(")")[2].split()[0] == "T"

    def send(self, message: Message) -> None:
        """Queue a message without blocking. Raises ChannelClosed."""
        self.channel.send(message)

    def receive(self, timeout: float | None) -> list[AnyMessage]:
        """What it sent. Raises ChannelClosed at the end."""
        return self.channel.receive(timeout)

    def exit_cause(self) -> str:
        """Why the process ended, in words; asked once its channel is closed."""
        try:
            code = self._process.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            return "the engine closed its channel"
        if code < 0:
            return f"the engine process was killed by {signal.Signals(-code).name}"
        return f"the engine process exited with status {code}"

    def kill(self) -> None:
        """End the process at once, stopped or not, and close the channel; does not wait."""
        self.channel.close()
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def wait(self, timeout: float) -> None:
        """Wait for its end; after `timeout` seconds end it."""
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def lasting_parent() -> int:
    """This process's id, where an engine started now may be tied to its life; else 0.

    Linux ties a child to the *thread* that forked it. Only the main one (whose id is the process's)
    is sure to last as long as the process: an `LLM` made in a thread of a pool outlives the thread.
    """
    return os.getpid() if threading.get_native_id() == os.getpid() else 0
