"""What a worker process runs: it answers on one socket.

The first frame is a pickled ``(niceness, factory)``; its answer says that the worker is warm. Every
later frame is a piece of work for what the factory returned.

    to the worker     <length, seconds allowed> payload
    from the worker   <length, outcome> payload

It ends when the other end of the socket is gone. Work that takes longer than it may is ended by the
system, even if nobody is left who waits for it.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import pickle
import signal
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import BinaryIO

from streamserve.errors import EngineError, RequestError

Handler = Callable[[bytes], bytes]

REQUEST_HEAD = struct.Struct("=Qd")
ANSWER_HEAD = struct.Struct("=QB")
DONE, FAILED = 0, 1

logger = logging.getLogger(__name__)


def main(fd: int) -> None:
    """Answer on the socket ``fd`` until it is closed."""
    with socket.socket(fileno=fd) as sock, sock.makefile("rb") as requests:
        first = _read(requests)
        if first is None:
            return
        niceness, factory = pickle.loads(first[0])
        os.nice(niceness)
        handler: Handler = factory()
        gc.freeze()
        with suppress(ConnectionError):  # the server is gone
            _answer_all(handler, sock, requests)


def _answer_all(handler: Handler, sock: socket.socket, requests: BinaryIO) -> None:
    _answer(sock, DONE, b"")
    while (request := _read(requests)) is not None:
        payload, timeout_s = request
        signal.alarm(math.ceil(timeout_s) + 1)
        outcome, answer = _handle(handler, payload)
        signal.alarm(0)
        _answer(sock, outcome, answer)


def _handle(handler: Handler, payload: bytes) -> tuple[int, bytes]:
    try:
        return DONE, handler(payload)
    except (RequestError, EngineError) as error:
        return FAILED, pickle.dumps(error)
    except Exception as error:
        logger.exception("work in a worker process failed")
        kind = type(error).__name__
        return FAILED, pickle.dumps(EngineError(f"the prompt could not be prepared: {kind}"))


def _read(requests: BinaryIO) -> tuple[bytes, float] | None:
    head = requests.read(REQUEST_HEAD.size)
    if len(head) < REQUEST_HEAD.size:
        return None
    length, timeout_s = REQUEST_HEAD.unpack(head)
    payload = requests.read(length)
    return (payload, timeout_s) if len(payload) == length else None


def _answer(sock: socket.socket, outcome: int, payload: bytes) -> None:
    sock.sendall(ANSWER_HEAD.pack(len(payload), outcome))
    sock.sendall(payload)
