"""Waiting on the event loop for what another thread does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVarTuple

_Ts = TypeVarTuple("_Ts")


async def until_done(future: Future[Any]) -> None:
    """Wait for another thread's future; leaves its result and its exception in it."""
    loop = asyncio.get_running_loop()
    waiter: asyncio.Future[None] = loop.create_future()
    future.add_done_callback(lambda _: call_soon(loop, _resolve, waiter))
    await waiter


def call_soon(
    loop: asyncio.AbstractEventLoop, callback: Callable[[*_Ts], object], *args: *_Ts
) -> None:
    """Have the loop call back, from another thread; a loop that is closed by now need not hear."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(callback, *args)


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
