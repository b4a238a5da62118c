"""Running the application: uvicorn on uvloop, with our own signals and our own order of closing.

::

    first signal    the gate closes (503 for newcomers, /health too); the listener stays open
                    wait until the last request has left, drain_timeout_s at most
    second signal   do not wait
                    engine.stop: what still runs ends with an error event
                    uvicorn closes the listener and what connections are left
    third signal    the process is killed
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import uvicorn

from streamserve.api.app import ApiApp
from streamserve.api.protocol import protocol_class
from streamserve.config import ApiConfig, TlsConfig
from streamserve.errors import ConfigError, EngineDeadError

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_FLUSH_TIMEOUT_S = 1.0
"""How long the last frames may take to leave: a reader that does not read must not hold us up."""


def bind_sockets(config: ApiConfig) -> list[socket.socket]:
    """Bind ``host:port`` without listening yet; port 0 takes a free one.

    Separate from ``serve`` so that a port in use is known before a model is loaded. Raises
    ``ConfigError``.
    """
    bound: list[socket.socket] = []
    port = config.port
    try:
        addresses = socket.getaddrinfo(
            config.host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        for family, kind, protocol, _, address in dict.fromkeys(addresses):
            sock = socket.socket(family, kind, protocol)
            bound.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                # "localhost" is both 127.0.0.1 and ::1: each has a socket of its own.
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((address[0], port, *address[2:]))
            port = sock.getsockname()[1]
    except OSError as exc:
        for sock in bound:
            sock.close()
        raise _cannot_listen(config, exc) from exc
    return bound


def _cannot_listen(config: ApiConfig, exc: OSError) -> ConfigError:
    reason = os.strerror(exc.errno) if exc.errno and exc.errno > 0 else str(exc)
    return ConfigError(f"cannot listen on {config.host}:{config.port}: {reason}")


class _UvicornServer(uvicorn.Server):
    """uvicorn without its signal handling, telling when it listens.

    Importing sse-starlette puts a handler of its own into ``uvicorn.Server``: here nobody calls it.
    """

    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = on_started

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started()


class ApiServer:
    """One run of the server, from the start of the engine to its end."""

    def __init__(
        self,
        app: ApiApp,
        config: ApiConfig,
        *,
        sockets: Sequence[socket.socket] | None = None,
        on_ready: Callable[[str], None] | None = None,
        on_draining: Callable[[int], None] | None = None,
    ) -> None:
        self._app = app
        self._config = config
        self._sockets = None if sockets is None else list(sockets)
        self._on_ready = on_ready
        self._on_draining = on_draining
        self._shutdown_wanted = asyncio.Event()
        self._now_wanted = asyncio.Event()

    def request_shutdown(self) -> None:
        """What a signal calls: drain at the first call, end now at the second."""
        if self._shutdown_wanted.is_set():
            self._now_wanted.set()
        self._shutdown_wanted.set()

    async def run(self) -> None:
        """Serve until ``request_shutdown``.

        Raises ``ConfigError`` if it cannot listen, and ``EngineDeadError`` after an orderly end if
        the engine died: whoever supervises the process starts another.
        """
        sockets = bind_sockets(self._config) if self._sockets is None else self._sockets
        engine, workers = self._app.context.engine, self._app.context.prompt_workers
        server = _UvicornServer(self._uvicorn_config(), lambda: self._started(sockets))
        closer = asyncio.create_task(self._close_when_wanted(server))
        watcher = asyncio.create_task(self._close_when_dead())
        try:
            await engine.start()
            if workers is not None:
                workers.start()
            await server.serve(sockets)
            if watcher.done():
                raise EngineDeadError(f"the engine is dead: {engine.dead_reason}")
        except OSError as exc:
            raise _cannot_listen(self._config, exc) from exc
        finally:
            closer.cancel()
            watcher.cancel()
            await engine.stop()
            self._app.context.preprocessor.close()
            if workers is not None:
                workers.close()
            for sock in sockets:
                sock.close()

    def _uvicorn_config(self) -> uvicorn.Config:
        return uvicorn.Config(
            self._app,
            http=protocol_class(self._config.max_header_bytes, self._config.header_timeout_s),
            ws="none",
            lifespan="off",
            log_config=None,
            log_level=self._config.uvicorn_log_level,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=1,  # only for connections that are left after the drain
            **_tls_options(self._config.tls),
        )

    def _started(self, sockets: Sequence[socket.socket]) -> None:
        if self._on_ready is None or self._shutdown_wanted.is_set():
            return
        host = f"[{self._config.host}]" if ":" in self._config.host else self._config.host
        scheme = "http" if self._config.tls is None else "https"
        self._on_ready(f"{scheme}://{host}:{sockets[0].getsockname()[1]}")

    async def _close_when_wanted(self, server: uvicorn.Server) -> None:
        await self._shutdown_wanted.wait()
        try:
            await self._drain(server)
        finally:
            server.should_exit = True

    async def _close_when_dead(self) -> None:
        await self._app.context.engine.wait_dead()
        self._shutdown_wanted.set()

    async def _drain(self, server: uvicorn.Server) -> None:
        gate = self._app.context.gate
        gate.close()
        if gate.num_inside and self._on_draining is not None:
            self._on_draining(gate.num_inside)
        empty = asyncio.create_task(gate.wait_empty())
        now = asyncio.create_task(self._now_wanted.wait())
        try:
            await asyncio.wait(
                (empty, now),
                timeout=self._config.drain_timeout_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
            await self._app.context.engine.stop()
            await asyncio.wait((empty,), timeout=_FLUSH_TIMEOUT_S)
            if gate.num_inside:  # their readers do not read: nothing more will leave
                for connection in list(server.server_state.connections):
                    connection.transport.abort()
                await asyncio.wait((empty,), timeout=_FLUSH_TIMEOUT_S)
        finally:
            empty.cancel()
            now.cancel()


def _tls_options(tls: TlsConfig | None) -> dict[str, Any]:
    if tls is None:
        return {}
    return {f"ssl_{name}": value for name, value in asdict(tls).items()}


def serve(
    app: ApiApp,
    config: ApiConfig,
    *,
    sockets: Sequence[socket.socket] | None = None,
    on_ready: Callable[[str], None] | None = None,
    on_draining: Callable[[int], None] | None = None,
) -> None:
    """Serve until a signal says otherwise; returns after a clean end. Main thread only for signals.

    ``sockets`` come from ``bind_sockets`` (bound here if ``None``). ``on_ready(url)`` is called
    once connections are accepted, ``on_draining(n)`` when ``n`` requests are waited for. Prints
    nothing. Raises ``ConfigError`` if the address cannot be listened on, and ``EngineDeadError``.
    """
    with asyncio.Runner(loop_factory=_new_event_loop) as runner:
        runner.run(_serve_until_signal(app, config, sockets, on_ready, on_draining))


async def _serve_until_signal(
    app: ApiApp,
    config: ApiConfig,
    sockets: Sequence[socket.socket] | None,
    on_ready: Callable[[str], None] | None,
    on_draining: Callable[[int], None] | None,
) -> None:
    server = ApiServer(app, config, sockets=sockets, on_ready=on_ready, on_draining=on_draining)
    with _signals_call(server.request_shutdown), hangup_calls(app.context.keys.reload, config):
        await server.run()


@contextlib.contextmanager
def _signals_call(on_signal: Callable[[], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    num_signals = 0

    def handle() -> None:
        nonlocal num_signals
        num_signals += 1
        if num_signals == 2:  # the next one finds the default handler: it kills
            for sig in _SIGNALS:
                loop.remove_signal_handler(sig)
                signal.signal(sig, signal.SIG_DFL)
        on_signal()

    for sig in _SIGNALS:
        loop.add_signal_handler(sig, handle)
    try:
        yield
    finally:
        for sig in _SIGNALS:
            loop.remove_signal_handler(sig)


@contextlib.contextmanager
def hangup_calls(
    reload: Callable[[], Coroutine[None, None, None]], config: ApiConfig
) -> Iterator[None]:
    """SIGHUP reads the file of API keys again, if there is one."""
    is_main = threading.current_thread() is threading.main_thread()
    if config.api_key_file is None or not is_main or sys.platform == "win32":
        yield
        return
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()

    def handle() -> None:
        task = loop.create_task(reload())
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    loop.add_signal_handler(signal.SIGHUP, handle)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)


def _new_event_loop() -> asyncio.AbstractEventLoop:
    if sys.platform == "win32":
        return asyncio.new_event_loop()
    import uvloop

    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop
