"""Waiting on the event loop for what another thread resolves."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future

from streamserve.core.plan import ModelRunnerOutput


async def until_done(future: Future[ModelRunnerOutput]) -> None:
    """Wait for another thread's future; leaves its result and its exception in it."""
    loop = asyncio.get_running_loop()
    waiter: asyncio.Future[None] = loop.create_future()
    future.add_done_callback(lambda _: _call_soon(loop, waiter))
    await waiter


def _call_soon(loop: asyncio.AbstractEventLoop, waiter: asyncio.Future[None]) -> None:
    try:
        loop.call_soon_threadsafe(_resolve, waiter)
    except RuntimeError:  # the loop was closed while the device worked
        pass


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
