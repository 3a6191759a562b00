"""Work beside the event loop: in a thread where it would hold up others, in one that may be left.

No lock and no state: what runs here only reads what it is given.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

T = TypeVar("T")


async def in_thread_if(large: bool, function: Callable[..., T], *args: Any) -> T:
    """`function(*args)`: much work in a thread, so that the event loop goes on.

    A client that leaves meanwhile is noticed when the result is there.
    """
    return await asyncio.to_thread(function, *args) if large else function(*args)


async def in_daemon_thread(function: Callable[..., T], *args: Any) -> T:
    """`function(*args)` in a thread that does not keep the process alive.

    A pool's threads would: Ctrl-C could not end the server while it downloads.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(cast(T, result))

    def work() -> None:
        result, failed = None, None
        try:
            result = function(*args)
        except BaseException as error:
            failed = error
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, result, failed)

    threading.Thread(target=work, daemon=True).start()
    return await done
