"""The API process's life: listen first, load behind it, serve, drain, and leave with a true status.

    start ── port answers 503 with the phase ── ready ── SIGINT or SIGTERM ── drain ── exit 0
                          │                       │                             └─ again: at once,
                          │                       │                                exit 128 + signal
                          └── cannot start,       └── engine dies: restart, requests go on
                              or hangs: exit 1        └── again and again, or no restarts wanted:
                                                          live requests get the cause, exit 1

Heavy imports happen in here, after the engine process was started, so that both load at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pagedserve import logs
from pagedserve.api.gate import Gate
from pagedserve.api.keys import Keys
from pagedserve.config import Config, ServerConfig, api_key_from_environment
from pagedserve.engine import phases
from pagedserve.engine.client import EngineClient
from pagedserve.engine.watch import Recovery
from pagedserve.errors import PagedServeError, StartupError
from pagedserve.limits import Limits

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp, Receive, Scope, Send

    from pagedserve.api.service import Service

DEATH_SECONDS = 2.0  # how long a dead server still says why, before it exits
CLOSE_SECONDS = 2  # for connections to take their last bytes, and for the engine to stop
KEEP_ALIVE_SECONDS = 65  # longer than the pools of common clients and proxies keep a connection

Say = Callable[[str], None]


def run(
    config: Config, say: Say = print, *, engine_module: str = "pagedserve.engine.process"
) -> int:
    """Serve until a signal; the exit status. `say` gets lines for people.

    Raises StartupError when the server cannot start, PagedServeError when its engine died later.
    """
    server = config.server
    keys = Keys(server.api_key or api_key_from_environment(), server.api_key_file)
    with contextlib.ExitStack() as stack:
        stack.enter_context(logs.to_standard_error(keys.is_one, prompts=server.log_prompts))
        if server.access_log:
            stack.enter_context(logs.access_to_standard_error(keys.is_one))
        started, gate = time.monotonic(), Gate.opened(server, keys)
        stack.enter_context(gate.sock)
        say(f"listening on {gate.url} (503 until the model is loaded)")
        for line in gate.warnings():
            say(f"{'':10} {line}")
        client = EngineClient(engine_module, recovery(server))
        life = Life(config, client, gate, say, started)
        stack.callback(close, client, life)
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(life.live())


def close(client: EngineClient, life: Life) -> None:
    """End the engine."""
    # While it loads, it reads no orders: waiting for it would be in vain.
    client.close(CLOSE_SECONDS if client.ready and not life.stopped_by else 0.1)


def recovery(config: ServerConfig) -> Recovery:
    """What happens to an engine that dies, stalls or hangs."""
    return Recovery(config.max_engine_restarts, config.load_timeout)


class Life:
    """One run of the server."""

    def __init__(self, config: Config, client: EngineClient, gate: Gate, say: Say, started: float):
        self._config = config
        self._client = client
        self._gate = gate
        self._say = say
        self._started = started
        self.stopped_by = 0  # the signal that stopped it at once
        self._first_signal = asyncio.Event()
        self._second_signal = asyncio.Event()
        self._reported = ("", started)

    async def live(self) -> int:
        """The whole life; see `run`."""
        from pagedserve.api.app import build_app
        from pagedserve.api.service import Service

        self._watch_signals()
        service = Service(self._config, self._client)
        service.on_phase = self._report
        app = cancelled_quietly(build_app(service, self._gate))
        server = http_server(app, self._gate)
        serving = asyncio.create_task(server.serve(sockets=[self._gate.sock]))
        starting = asyncio.create_task(self._start(service))
        try:
            return await self._until_the_end(service)
        finally:
            starting.cancel()
            service.close()
            server.should_exit = True
            server.force_exit = bool(self.stopped_by)
            await serving

    async def _start(self, service: Service) -> None:
        await service.start()
        if service.ready is None:
            return
        engine, where = service.ready, self._gate.url
        self._report(
            "ready",
            f"{engine.dtype} on {engine.device}, context "
            f"{engine.max_model_len}, {engine.num_blocks} KV blocks of {engine.block_size} tokens",
        )
        if took := phases.said(self._client.start_phases):
            self._say(f"{'':10} engine: {took}")
        assert service.text is not None
        for line in service.text.lines():
            self._say(f"{'':10} {line}")
        self._say(f"\n{service.model_name} is served at {where}/v1 - try:\n")
        self._say(example(where, service.model_name, chat=service.template is not None))

    async def _until_the_end(self, service: Service) -> int:
        """Wait for a signal or a death; then drain, or raise the cause."""
        await first_of(self._first_signal.wait(), service.failure)
        if not service.failure.done():
            self._say("\nshutting down: running requests finish (again: stop at once)")
            service.draining = True
            drained = asyncio.timeout(self._config.server.shutdown_timeout)
            with contextlib.suppress(TimeoutError):
                async with drained:
                    await first_of(self._second_signal.wait(), service.failure, until_idle(service))
        if service.failure.done():
            await self._tell_of_death(service)
        return 128 + self.stopped_by if self.stopped_by else 0

    async def _tell_of_death(self, service: Service) -> None:
        """Raise the cause; after a moment in which clients can read it, if there were clients."""
        cause = service.failure.result()
        if self._client.ready is None:
            raise StartupError(cause)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DEATH_SECONDS):
                await self._first_signal.wait()
        raise PagedServeError(f"the engine died: {cause}")

    def _report(self, phase: str, detail: str = "") -> None:
        """A line when a phase begins, and of a long one every second how far it is.

        The latter begin with a carriage return: each takes the place of the one before.
        """
        now = time.monotonic()
        again = phase == self._reported[0]
        if again and now < self._reported[1] + 1.0:
            return
        self._reported = phase, now
        line = f"{now - self._started:6.2f} s  {phase} {detail}".rstrip()
        self._say(f"\r{line}" if again else line)

    def _watch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        orders: dict[int, Callable[[int], None]] = dict.fromkeys(
            (signal.SIGINT, signal.SIGTERM), self._signalled
        )
        if self._gate.reloads:  # else it ends the process, as where a terminal is closed
            orders[signal.SIGHUP] = lambda number: self._gate.reload()
        for number, order in orders.items():
            with contextlib.suppress(ValueError, RuntimeError):  # not in the main thread: a test
                loop.add_signal_handler(number, order, number)

    def _signalled(self, number: int) -> None:
        if self._first_signal.is_set():
            self.stopped_by = number
            self._second_signal.set()
        self._first_signal.set()


async def first_of(*waits: object) -> None:
    """Wait until the first of `waits` (coroutines, futures) is done; cancel the coroutines."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]  # type: ignore[call-overload]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            if isinstance(task, asyncio.Task):
                task.cancel()


async def until_idle(service: Service) -> None:
    """Wait until no request is under way."""
    while service.answers:
        await asyncio.sleep(0.05)


def cancelled_quietly(app: ASGIApp) -> ASGIApp:
    """`app` without the traceback that a cancelled request leaves.

    Only the end of the process cancels one, after its connection was cut: nobody is left to tell.
    """

    async def outer(scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await app(scope, receive, send)

    return outer


def http_server(app: ASGIApp, gate: Gate) -> uvicorn.Server:
    """A uvicorn server that leaves signals and logging to us, and cuts readers that stall."""
    import uvicorn

    from pagedserve.api.protocol import bounded_heads

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # A cut connection ends its request as any disconnect does; uvicorn would cancel it.
            wait = 0 if self.force_exit else CLOSE_SECONDS
            cutting = asyncio.get_running_loop().call_later(wait, self._cut_connections)
            try:
                await super().shutdown(sockets)
            finally:
                cutting.cancel()

        def _cut_connections(self) -> None:
            for connection in list(self.server_state.connections):
                connection.transport.abort()

    config = uvicorn.Config(
        app,
        http=bounded_heads(Limits.of(gate.config.limits).head_bytes),
        log_config=None,
        access_log=gate.config.access_log,
        lifespan="off",
        ws="none",
        server_header=False,
        proxy_headers=False,  # anybody on this machine could write them
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=5 * CLOSE_SECONDS,  # long after our own cut
    )
    config.load()
    # Its warnings are of clients that speak no HTTP; they are told, and could fill a disk with it.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    config.ssl = gate.tls
    return Server(config)


def example(where: str, model: str, *, chat: bool) -> str:
    """A first request to copy: a chat where the model has a template for it."""
    route, what = "completions", '"prompt": "Hello"'
    if chat:
        route, what = "chat/completions", '"messages": [{"role": "user", "content": "Hello!"}]'
    return (
        f"  curl {where}/v1/{route} -H 'Content-Type: application/json' -d "
        f'\'{{"model": "{model}", "stream": true, {what}}}\''
    )
