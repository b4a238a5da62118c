"""An answer that was cut must not look like a whole one."""

from __future__ import annotations

from streamserve.core.request import FinishReason
from streamserve.engine.outputs import RequestOutput
from streamserve.errors import EngineError


class RequestAbortedError(EngineError):
    """The engine gave the request up before its answer was complete."""

    status = 503

    def __init__(self) -> None:
        super().__init__(
            "The request was aborted before its answer was complete: the server is shutting down",
            code="aborted",
        )


def check_success(output: RequestOutput) -> None:
    """Raise unless ``output`` is part of a success: a cut answer must not look like a whole one."""
    if output.finish_reason is FinishReason.ABORT:
        raise RequestAbortedError
    if output.finish_reason is FinishReason.ERROR:
        raise EngineError("The request failed while it was being served")
