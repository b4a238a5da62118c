"""A browser for the tests of the pages; they are skipped where there is none."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.browser.chromium import EXECUTABLE, Browser, chromium


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    if EXECUTABLE is None:
        pytest.skip("needs Chromium (Debian's package chromium)")
    async with chromium() as running:
        yield running
