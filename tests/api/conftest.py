"""Shared by the tests of the API."""

import asyncio
from typing import Any

import pytest
import uvicorn.server


class Impatient:
    """asyncio as uvicorn sees it: its looks whether it is to end are a hundred times as many."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def sleep(self, delay: float) -> None:
        await asyncio.sleep(delay / 100)


@pytest.fixture(autouse=True, scope="session")
def impatient_uvicorn():
    """It looks every tenth of a second, twice for each server that a test ends."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uvicorn.server, "asyncio", Impatient())
        yield
