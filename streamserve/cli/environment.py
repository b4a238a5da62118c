"""What a process must have about it: variables before torch is imported, streams, whole text."""

from __future__ import annotations

import io
import os
import sys


def prepare_environment() -> None:
    """Set what is not set yet; without effect once torch is there."""
    # How long a compute thread spins for its next region before it sleeps: about 0.2 ms. libgomp's
    # own default, some 10 ms, takes the core from the event loop and from every other process.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")


def tolerate_any_encoding() -> None:
    """Read and print "?" for what the terminal's encoding lacks: nothing must end of that."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def whole_text(argument: str) -> str:
    """An argument of the command line, with "?" for bytes that were no text."""
    return argument.encode(errors="replace").decode()


def api_key_of_environment() -> str | None:
    """The key that a server requires and a client sends where no flag says one."""
    return os.environ.get("STREAMSERVE_API_KEY") or os.environ.get("VLLM_API_KEY") or None


def unread_vllm_variables() -> list[str]:
    """Names of vLLM's variables that are set, and say nothing to this server."""
    return sorted(
        name for name in os.environ if name.startswith("VLLM_") and name != "VLLM_API_KEY"
    )
