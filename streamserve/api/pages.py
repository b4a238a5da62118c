"""The pages for people: a chat at ``/``, the API at ``/docs``. One file each, nothing from outside.

What a page may do is said by its ``Content-Security-Policy``: its own script and style, known by
their hashes, talk to this server and to nobody else, and cannot turn text into HTML.
"""

from __future__ import annotations

import re
from base64 import b64encode
from hashlib import sha256
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

PAGES = {"/": "chat.html", "/docs": "docs.html"}


class Page:
    """One page, read when it is first asked for."""

    def __init__(self, file_name: str) -> None:
        self._file_name = file_name
        self._response: Response | None = None

    async def __call__(self, _request: Request) -> Response:
        """The page, the same for everybody."""
        if self._response is None:
            path = files("streamserve") / "assets" / "pages" / self._file_name
            self._response = _response(path.read_text(encoding="utf-8"))
        return self._response


def page_routes(*, has_chat: bool, has_docs: bool) -> list[Route]:
    """The routes of the pages that are served."""
    is_served = {"/": has_chat, "/docs": has_docs}
    return [
        Route(path, Page(file_name).__call__)
        for path, file_name in PAGES.items()
        if is_served[path]
    ]


def content_security_policy(html: str) -> str:
    """The policy under which ``html`` has all that it needs and nothing else."""
    scripts, styles = (
        " ".join(f"'sha256-{_digest(part)}'" for part in re.findall(pattern, html, re.DOTALL))
        for pattern in (r"<script>(.*?)</script>", r"<style>(.*?)</style>")
    )
    return (
        f"default-src 'none'; script-src {scripts}; style-src {styles}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )


def _digest(text: str) -> str:
    return b64encode(sha256(text.encode()).digest()).decode()


def _response(html: str) -> Response:
    headers = {
        "Cache-Control": "no-cache",
        "Content-Security-Policy": content_security_policy(html),
        "Cross-Origin-Opener-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return Response(html, headers=headers, media_type="text/html")
