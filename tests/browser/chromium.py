"""Headless Chromium over its DevTools pipe: no driver, no websocket, two file descriptors.

Messages are JSON, each ended by a zero byte. The browser reads descriptor 3 and writes 4.
"""

import asyncio
import base64
import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator
from itertools import count
from typing import Any

EXECUTABLE = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
_FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",  # tests may run as root, and open our own pages only
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
)
_TIMEOUT_S = 120.0


class Browser:
    """One browser process and what it says."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.WriteTransport) -> None:
        self._reader = reader
        self._writer = writer
        self._ids = count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.events: list[dict[str, Any]] = []
        self._task = asyncio.create_task(self._read())

    async def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its result."""
        message: dict[str, Any] = {"id": next(self._ids), "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        future = asyncio.get_running_loop().create_future()
        self._waiting[message["id"]] = future
        self._writer.write(json.dumps(message).encode() + b"\0")
        async with asyncio.timeout(_TIMEOUT_S):
            answer = await future
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    async def page(self, url: str, *, width: int = 1200, height: int = 800) -> "Page":
        """A new page of its own, at ``url``."""
        context = (await self.call("Target.createBrowserContext"))["browserContextId"]
        target = await self.call(
            "Target.createTarget",
            url="about:blank",
            browserContextId=context,
            width=width,
            height=height,
        )
        attached = await self.call(
            "Target.attachToTarget", targetId=target["targetId"], flatten=True
        )
        page = Page(self, attached["sessionId"])
        for domain in ("Page", "Runtime", "Log"):
            await page.call(f"{domain}.enable")
        await page.call("Page.navigate", url=url)
        await page.until("document.readyState === 'complete' && !!document.body")
        return page

    def close(self) -> None:
        self._task.cancel()
        self._writer.close()

    async def _read(self) -> None:
        while True:
            raw = await self._reader.readuntil(b"\0")
            message = json.loads(raw[:-1])
            future = self._waiting.pop(message.get("id"), None)
            if future is None:
                self.events.append(message)
            elif not future.done():
                future.set_result(message)


class Page:
    """One page: runs JavaScript, types keys, takes pictures."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        return await self._browser.call(method, self._session, **params)

    async def run(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited if it is a promise."""
        result = await self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    async def until(self, condition: str) -> None:
        """Wait for a JavaScript condition, looked at before each frame that the page draws."""
        look = f"(function look() {{ if ({condition}) done(true); else setTimeout(look, 10); }})()"
        await self.run(f"new Promise((done) => {{ {look} }})")

    async def type(self, text: str) -> None:
        """Into what has the focus."""
        await self.call("Input.insertText", text=text)

    async def press(self, key: str, code: int) -> None:
        """A key, by its name and its Windows code."""
        text = {"Enter": "\r"}.get(key, "")
        for kind in ("keyDown", "keyUp"):
            await self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
                **({"text": text} if text and kind == "keyDown" else {}),
            )

    async def screenshot(self) -> bytes:
        picture = await self.call("Page.captureScreenshot", format="png")
        return base64.b64decode(picture["data"])

    async def emulate(self, *, width: int, height: int, scheme: str = "light") -> None:
        """A screen's size and its owner's wish."""
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if width < 640 else 1,
            mobile=width < 640,
        )
        feature = {"name": "prefers-color-scheme", "value": scheme}
        await self.call("Emulation.setEmulatedMedia", features=[feature])

    @property
    def complaints(self) -> list[str]:
        """What the page's console and the browser's log hold: violations, errors, exceptions."""
        found = []
        for event in self._browser.events:
            if event.get("sessionId") != self._session:
                continue
            params = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                found.append(str(params["exceptionDetails"]))
            elif event["method"] == "Log.entryAdded":
                found.append(params["entry"]["text"])
            elif event["method"] == "Runtime.consoleAPICalled":
                found.append(str(params["args"]))
        return found


@contextlib.asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """A browser with a profile of its own, gone afterwards."""
    assert EXECUTABLE is not None
    loop = asyncio.get_running_loop()
    to_browser, from_us = os.pipe()
    from_browser, to_us = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # Moves the pipes to the two descriptors that the browser expects, and becomes the browser.
        command = (
            "import fcntl, os, sys; "
            "ends = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3]]; "
            "os.dup2(ends[0], 3); os.dup2(ends[1], 4); os.execv(sys.argv[3], sys.argv[3:])"
        )
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            command,
            str(to_browser),
            str(to_us),
            EXECUTABLE,
            *_FLAGS,
            f"--user-data-dir={profile}",
            pass_fds=(to_browser, to_us),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            env={**os.environ, "HOME": profile, "no_proxy": "*"},
        )
        os.close(to_browser)
        os.close(to_us)
        reader = asyncio.StreamReader(limit=64 * 2**20)
        reading, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(from_browser, "rb")
        )
        writer, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, os.fdopen(from_us, "wb"))
        browser = Browser(reader, writer)
        try:
            yield browser
        finally:
            browser.close()
            reading.close()
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await process.wait()
