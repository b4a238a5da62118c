"""``POST /debug/inject_fault``: something goes wrong because a test asks for it.

The path exists only where the server runs with ``--enable-fault-injection``.
"""

from __future__ import annotations

import os
import signal
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from streamserve.api.body import parse_json_object, read_body
from streamserve.api.context import ApiContext
from streamserve.api.fields import (
    FieldTable,
    integer,
    number,
    one_of,
    read_str,
    require,
)
from streamserve.engine.fault_injection import FaultInjectingRunner, FaultKind
from streamserve.errors import InvalidParameterError

NOOP = "noop"  # is the hook there?
CLEAR = "clear"  # forget what has not happened yet
WORKER_DEATH = "worker_death"  # of the processes that read long bodies
KINDS = (NOOP, CLEAR, WORKER_DEATH, *FaultKind)
_MAX_STEPS = 2**20
_MAX_BYTES = 2**16


FAULT_TABLE = FieldTable(
    {
        "delay_s": number(0.0, 60.0),
        "kind": one_of(*KINDS),
        "num_steps": integer(1, _MAX_STEPS),
        "request_id": read_str,
    },
    required=("kind",),
)


class FaultEndpoint:
    """Hands faults to the runner, and has some of its own."""

    def __init__(self, context: ApiContext, runner: FaultInjectingRunner) -> None:
        self._context = context
        self._runner = runner

    async def __call__(self, request: Request) -> Response:
        """Answers when the fault is armed, not when it has happened."""
        raw = await read_body(request.scope, request.receive, max_bytes=_MAX_BYTES)
        values, unknown = FAULT_TABLE.read(parse_json_object(raw))
        if unknown:
            raise InvalidParameterError(f"Unknown field: {unknown[0][:64]}", param=unknown[0][:64])
        kind = require(values, "kind")
        self._inject(kind, {key: value for key, value in values.items() if key != "kind"})
        return Response(orjson.dumps({"kind": kind}), media_type="application/json")

    def _inject(self, kind: str, how: dict[str, Any]) -> None:
        if kind == CLEAR:
            self._runner.clear()
        elif kind == WORKER_DEATH:
            workers = self._context.prompt_workers
            for pid in workers.pids if workers is not None else ():
                os.kill(pid, signal.SIGKILL)
        elif kind != NOOP:
            try:
                self._runner.inject(FaultKind(kind), **how)
            except ValueError as error:
                raise InvalidParameterError(str(error), param="kind") from error
