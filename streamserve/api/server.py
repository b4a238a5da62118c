"""Running the application: uvicorn on uvloop, with our own signals and our own order of closing.

::

    first signal    the gate closes (503 for newcomers, /health and /ready); the listener stays open
                    wait until the last request has left, drain_timeout_s at most
    second signal   do not wait
                    engine.stop: what still runs ends with an error event
                    uvicorn closes the listener and what connections are left
    third signal    the process is killed
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import uvicorn
from starlette.applications import Starlette

from streamserve.api.app import ApiApp
from streamserve.api.file_limit import connections_allowed
from streamserve.api.protocol import protocol_class
from streamserve.config import ApiConfig, TlsConfig
from streamserve.errors import ConfigError, EngineDeadError

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NUM_LOOKS = 8  # at the engine's steps, before it is taken to hang
_MAX_ADMIN_CONNECTIONS = 64
_FLUSH_TIMEOUT_S = 1.0
"""How long the last frames may take to leave: a reader that does not read must not hold us up."""


def bind_sockets(config: ApiConfig) -> list[socket.socket]:
    """Bind ``host:port`` without listening yet; port 0 takes a free one.

    Separate from ``serve`` so that a port in use is known before a model is loaded. Raises
    ``ConfigError``.
    """
    sockets = _bind(config.host, config.port)
    for sock in sockets:  # those that are accepted inherit it; the kernel then leaves it alone
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, config.streams.send_buffer_bytes)
    return sockets


def bind_admin_sockets(config: ApiConfig) -> list[socket.socket]:
    """As ``bind_sockets``, for the operators' port; none if there is no such port."""
    return [] if config.admin_port is None else _bind(config.admin_host, config.admin_port)


def _bind(host: str, port: int) -> list[socket.socket]:
    bound: list[socket.socket] = []
    wanted = port
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
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
        raise _cannot_listen(host, wanted, exc) from exc
    return bound


def _cannot_listen(host: str, port: int, exc: OSError) -> ConfigError:
    reason = os.strerror(exc.errno) if exc.errno and exc.errno > 0 else str(exc)
    if exc.errno == errno.EADDRINUSE:
        reason += " (--port chooses another)"
    return ConfigError(f"cannot listen on {host}:{port}: {reason}")


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
        admin_sockets: Sequence[socket.socket] | None = None,
        on_ready: Callable[[str], None] | None = None,
        on_draining: Callable[[int], None] | None = None,
    ) -> None:
        self._app = app
        self._config = config
        self._sockets = None if sockets is None else list(sockets)
        self._admin_sockets = None if admin_sockets is None else list(admin_sockets)
        self._on_ready = on_ready
        self._on_draining = on_draining
        self._shutdown_wanted = asyncio.Event()
        self._now_wanted = asyncio.Event()
        self._is_told_to_end = False

    def request_shutdown(self) -> None:
        """What a signal calls: drain at the first call, end now at the second."""
        self._is_told_to_end |= not self._app.context.engine.is_dead
        if self._shutdown_wanted.is_set():
            self._now_wanted.set()
        self._shutdown_wanted.set()

    async def run(self) -> None:
        """Serve until ``request_shutdown``.

        Raises ``ConfigError`` if it cannot listen, and ``EngineDeadError`` after an orderly end if
        the engine died: whoever supervises the process starts another. Not where it was told to end
        before that, and all that it had begun ended well.
        """
        config, context = self._config, self._app.context
        sockets = bind_sockets(config) if self._sockets is None else self._sockets
        engine, workers = context.engine, context.prompt_workers
        max_connections = connections_allowed(config.max_connections)
        server = _UvicornServer(
            self._uvicorn_config(self._app, max_connections), lambda: self._started(sockets)
        )
        helpers = [
            asyncio.create_task(self._close_when_wanted(server)),
            asyncio.create_task(self._close_when_dead()),
            asyncio.create_task(self._watch_for_hangs()),
        ]
        try:
            await engine.start()
            if workers is not None:
                workers.start()
            async with self._admin_server():
                await server.serve(sockets)
            ended_well = self._is_told_to_end and not engine.has_failed_requests
            if engine.is_dead and not ended_well:
                raise EngineDeadError(f"the engine is dead: {engine.dead_reason}")
        except OSError as exc:
            raise _cannot_listen(config.host, config.port, exc) from exc
        finally:
            for helper in helpers:
                helper.cancel()
            await engine.stop()
            context.preprocessor.close()
            if workers is not None:
                workers.close()
            for sock in sockets:
                sock.close()

    @contextlib.asynccontextmanager
    async def _admin_server(self) -> AsyncIterator[None]:
        """The operators' port, open until the last stream has ended."""
        app = self._app.admin
        if app is None:
            yield
            return
        given = self._admin_sockets
        sockets = bind_admin_sockets(self._config) if given is None else given
        started = asyncio.Event()
        server = _UvicornServer(self._uvicorn_config(app, _MAX_ADMIN_CONNECTIONS), started.set)
        serving = asyncio.create_task(server.serve(sockets))
        try:
            waiting = asyncio.ensure_future(started.wait())
            await asyncio.wait((serving, waiting), return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            yield
        finally:
            server.should_exit = True
            await serving
            for sock in sockets:
                sock.close()

    def _uvicorn_config(self, app: Starlette, max_connections: int) -> uvicorn.Config:
        config = self._config
        return uvicorn.Config(
            app,
            http=protocol_class(
                max_header_bytes=config.max_header_bytes,
                receive_timeout_s=config.receive_timeout_s,
                stall_timeout_s=config.streams.stall_timeout_s,
                max_connections=max_connections,
                high_water_bytes=config.streams.high_water_bytes,
                on_refused=self._app.context.metrics.refused_connection,
                on_stall=self._app.context.metrics.reader_stalled,
            ),
            ws="none",
            lifespan="off",
            log_config=None,
            log_level=config.uvicorn_log_level,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            # uvicorn takes whole seconds and hands them on as they are.
            timeout_keep_alive=config.keep_alive_timeout_s,  # type: ignore[arg-type]
            timeout_graceful_shutdown=1,  # only for connections that are left after the drain
            **_tls_options(config.tls),
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

    async def _watch_for_hangs(self) -> None:
        watch = self._app.context.hang_watch
        while True:
            watch.stalled_s()
            await asyncio.sleep(watch.limit_s / _NUM_LOOKS)

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
            self._app.context.kept.close()
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
    admin_sockets: Sequence[socket.socket] | None = None,
    on_ready: Callable[[str], None] | None = None,
    on_draining: Callable[[int], None] | None = None,
) -> None:
    """Serve until a signal says otherwise; returns after a clean end. Main thread only for signals.

    The sockets come from ``bind_sockets`` and ``bind_admin_sockets`` (bound here if ``None``).
    ``on_ready(url)`` is called once connections are accepted, ``on_draining(n)`` when ``n``
    requests are waited for. Prints nothing. Raises ``ConfigError`` if an address cannot be listened
    on, and ``EngineDeadError``.
    """
    with asyncio.Runner(loop_factory=_new_event_loop) as runner:
        runner.run(
            _serve_until_signal(
                app,
                config,
                sockets=sockets,
                admin_sockets=admin_sockets,
                on_ready=on_ready,
                on_draining=on_draining,
            )
        )


async def _serve_until_signal(app: ApiApp, config: ApiConfig, **options: Any) -> None:
    server = ApiServer(app, config, **options)
    with signals_call(server.request_shutdown), hangup_calls(app.context.keys.reload, config):
        await server.run()


@contextlib.contextmanager
def signals_call(on_signal: Callable[[], None]) -> Iterator[None]:
    """SIGINT and SIGTERM call ``on_signal`` twice; the third kills. Main thread, or nothing."""
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
