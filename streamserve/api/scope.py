"""What the server leaves in an ASGI scope for the token path."""

from __future__ import annotations

RAW_SEND = "streamserve.raw_send"
"""The server's own ``send``, which passes no middleware."""

CLOSE_CONNECTION = "streamserve.close_connection"
"""In the extensions: its ``close()`` ends the connection once what was sent has left."""
