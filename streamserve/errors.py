"""Every exception that streamserve raises on purpose.

StreamServeError
├── ConfigError                 a flag or config value that cannot be served
├── ModelLoadError              a checkpoint that cannot be loaded
│   ├── UnsupportedModelError   an architecture or feature that is not built
│   └── AdapterError            an adapter that cannot be loaded beside the model
├── KVCacheMemoryError          the KV cache does not fit into the memory there is
├── OutOfMemoryError            a step found no memory: a smaller one may
├── DeviceDeadError             the thread that runs the steps has died: none will run again
├── RequestError                a request that is refused before any byte is sent (HTTP 4xx/503)
│   ├── InvalidParameterError   a field's value is wrong                        (400)
│   ├── ContextLengthError      the prompt can never fit                        (400)
│   ├── QueueFullError          too many requests wait already                  (429)
│   ├── RateLimitError          a key's limit is reached                        (429)
│   └── DeadlineUnreachableError  what it asks of time cannot be kept           (503, 400)
└── EngineError                 a request that failed after it was accepted     (500)
    ├── RequestCancelledError   somebody else than its reader ended it          (499)
    ├── DeadlineExceededError   what it asked of time was not kept              (504, 503)
    └── EngineDeadError         the engine has stopped and says so              (503)

A message names the field, states the limit and the value that was given. Lack of room inside the
scheduler is a value (``None``), never an exception; the impossible is an ``assert``.
"""

from __future__ import annotations


class StreamServeError(Exception):
    """Root of the tree: catch this to catch everything that is ours."""


class ConfigError(StreamServeError):
    """A flag or config value that cannot be served."""


class ModelLoadError(StreamServeError):
    """A checkpoint that cannot be loaded."""


class UnsupportedModelError(ModelLoadError):
    """An architecture or feature that is not built; the message lists what is."""


class AdapterError(ModelLoadError):
    """An adapter that cannot be loaded beside the model."""


class KVCacheMemoryError(StreamServeError):
    """The KV cache does not fit into the memory there is."""


class OutOfMemoryError(StreamServeError):
    """A step found no memory on its device; one that computes less may."""


class DeviceDeadError(StreamServeError):
    """The thread that runs the steps has died: none will run again."""


class RequestError(StreamServeError):
    """A request that is refused before any byte is sent.

    ``param`` is the request field at fault (``None`` when no single field is), ``code`` OpenAI's
    machine-readable error code, ``status`` the HTTP status. ``retry_after_s``, if it is known, is
    when the same request is expected to be taken.
    """

    status = 400
    retry_after_s: float | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class InvalidParameterError(RequestError):
    """A field's value is wrong."""


class ContextLengthError(RequestError):
    """The prompt, or the prompt and ``max_tokens`` together, can never fit."""

    def __init__(self, message: str, *, param: str | None = "messages") -> None:
        super().__init__(message, param=param, code="context_length_exceeded")


class QueueFullError(RequestError):
    """Too many requests wait already; ``retry_after_s`` is when a place is expected."""

    status = 429

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message, code="queue_full")
        self.retry_after_s = retry_after_s


class RateLimitError(RequestError):
    """A key's limit is reached; ``retry_after_s`` is when there is enough again."""

    status = 429

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message, code="rate_limit_exceeded")
        self.retry_after_s = retry_after_s


class DeadlineUnreachableError(RequestError):
    """What a request asks of time cannot be kept; without ``retry_after_s`` not later either."""

    def __init__(self, message: str, *, param: str, retry_after_s: float | None) -> None:
        super().__init__(message, param=param, code="deadline_unreachable")
        self.status = 400 if retry_after_s is None else 503
        self.retry_after_s = retry_after_s


class EngineError(StreamServeError):
    """A request that failed after it was accepted; ``status`` is what it would have had.

    ``retry_after_s`` as of ``RequestError``.
    """

    status = 500
    retry_after_s: float | None = None

    def __init__(self, message: str, *, code: str = "internal_error") -> None:
        super().__init__(message)
        self.message = message
        self.code = code


class RequestCancelledError(EngineError):
    """Somebody else than its reader ended the request. No status of HTTP's own says that."""

    status = 499

    def __init__(self) -> None:
        super().__init__("The request was cancelled", code="cancelled")


class DeadlineExceededError(EngineError):
    """What a request asked of time was not kept: ``field`` is the request's."""

    def __init__(self, field: str, limit_ms: float) -> None:
        is_queued = field == "max_queue_ms"
        super().__init__(
            f"{field} of {limit_ms:g} has passed",
            code="queue_timeout" if is_queued else "deadline_exceeded",
        )
        self.status = 503 if is_queued else 504


class EngineDeadError(EngineError):
    """The engine has stopped: every request fails with this until the process is restarted."""

    status = 503

    def __init__(self, message: str) -> None:
        super().__init__(message, code="engine_dead")
