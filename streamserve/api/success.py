"""What counts as a whole answer: one that was cut must not look like it."""

from __future__ import annotations

from dataclasses import replace

from streamserve.core.request import FinishReason
from streamserve.engine.outputs import RequestOutput
from streamserve.engine.stream import RequestStream
from streamserve.errors import EngineError


class RequestAbortedError(EngineError):
    """The engine gave the request up before its answer was complete."""

    status = 503

    def __init__(self) -> None:
        super().__init__(
            "The request was aborted before its answer was complete: the server is shutting down",
            code="aborted",
        )


def check_success(output: RequestOutput) -> FinishReason:
    """The reason of a last output. Raises unless it is that of a success."""
    assert output.finish_reason is not None
    if output.finish_reason is FinishReason.ABORT:
        raise RequestAbortedError
    if output.finish_reason is FinishReason.ERROR:
        raise EngineError("The request failed while it was being served")
    return output.finish_reason


def end_early(stream: RequestStream, output: RequestOutput) -> RequestOutput:
    """Stop a request whose reader has all that it wants with ``output``; return the last output.

    That has nothing of ``output`` but its usage.
    """
    stream.close(FinishReason.STOP)
    return replace(
        output,
        text="",
        token_ids=[],
        logprobs=[],
        prompt_logprobs=None,
        finish_reason=FinishReason.STOP,
    )
