"""Which API a request is for."""

from __future__ import annotations

from starlette.types import Scope

_MESSAGES = "/v1/messages"


def route_path(scope: Scope) -> str:
    """The path that routing sees: a proxy's prefix must not hide what is behind it."""
    path: str = scope["path"]
    root_path: str = scope.get("root_path", "")
    if root_path and (path == root_path or path.startswith(root_path + "/")):
        return path[len(root_path) :]
    return path


def is_for_messages(scope: Scope) -> bool:
    """Whether it is for Anthropic's API, whose errors have another shape."""
    path = route_path(scope)
    return path == _MESSAGES or path.startswith(_MESSAGES + "/")
