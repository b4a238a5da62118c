"""What a client reads of what went wrong."""

from __future__ import annotations

from streamserve.errors import InvalidParameterError, OutOfMemoryError


def duplicate(request_id: str) -> InvalidParameterError:
    """The error for an id that is in use."""
    return InvalidParameterError(
        f"request_id must be unique, got {request_id!r} again", param="request_id"
    )


def is_out_of_memory(error: Exception) -> bool:
    """Whether a step that computes less may succeed."""
    return isinstance(error, OutOfMemoryError | MemoryError)


def name_of(error: BaseException) -> str:
    """What a client may read of an internal error: its kind. The log has the rest."""
    return type(error).__name__
