"""How log lines look: for people, or one JSON object each."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Any

import orjson

LOG_FORMATS = ("text", "json")
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}
"""What every record has: the rest is what a line is about."""


class JsonFormatter(logging.Formatter):
    """``time``, ``level``, ``logger``, ``message``, what ``extra`` held, and an ``exception``."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        content: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        content |= {key: value for key, value in vars(record).items() if key not in _OWN}
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(content, default=repr).decode()


def set_up_logs(log_format: str, *, log_requests: bool) -> None:
    """Let lines go to stderr, those about requests only if they are wanted."""
    if log_format == "json":
        handler = logging.StreamHandler()
        handler.setFormatter(JsonFormatter())
        root = logging.getLogger()
        root.handlers[:] = [handler]
        root.setLevel(logging.WARNING)
    if not log_requests:
        return
    requests = logging.getLogger("streamserve.requests")
    requests.setLevel(logging.INFO)
    if log_format == "text":
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        requests.addHandler(handler)
        requests.propagate = False
