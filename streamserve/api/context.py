"""What the endpoints share: one object, built by ``create_app``, passed explicitly."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from starlette.types import Receive, Scope

from streamserve.api.body import ignored_fields_header, read_body
from streamserve.api.disconnect import DisconnectGuard
from streamserve.api.gate import Gate
from streamserve.api.kept import KeptAnswers
from streamserve.api.metrics import Metrics
from streamserve.api.middleware import RAW_SEND
from streamserve.api.prompt_workers import PromptWorkers
from streamserve.api.prompts import PromptReader
from streamserve.api.request_log import RequestLog
from streamserve.api.running import RunningAnswers
from streamserve.api.served_models import ServedModels
from streamserve.api.sse_response import SseOptions
from streamserve.api.tenants import KeyRing
from streamserve.config import ApiConfig, EmbeddingConfig
from streamserve.core.clock import Clock
from streamserve.engine.async_engine import AsyncEngine
from streamserve.engine.hang_watch import HangWatch
from streamserve.engine.parsers.answer_format import AnswerFormat
from streamserve.engine.preprocess import Preprocessor
from streamserve.engine.tokenizer import Tokenizer
from streamserve.errors import InvalidParameterError

logger = logging.getLogger(__name__)

_MAX_LOGGED_FIELDS = 1000
_MAX_LOGGED_NAME = 64


class FieldLog:
    """Logs each field that nobody knows once, so that a chatty client does not fill the log."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def unknown(self, name: str) -> None:
        """Log ``name`` unless it was logged before."""
        name = name[:_MAX_LOGGED_NAME]
        if name in self._seen or len(self._seen) >= _MAX_LOGGED_FIELDS:
            return
        self._seen.add(name)
        logger.warning("ignored a request field that nobody knows: %r", name)


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiContext:
    """Everything an endpoint needs. ``wall_clock`` gives ``created``; ``clock`` is monotonic."""

    engine: AsyncEngine
    preprocessor: Preprocessor
    tokenizer: Tokenizer
    config: ApiConfig
    max_model_len: int
    prompts: PromptReader
    clock: Clock
    wall_clock: Callable[[], float]
    created: int
    metrics: Metrics
    keys: KeyRing
    gate: Gate
    kept: KeptAnswers
    hang_watch: HangWatch
    request_log: RequestLog
    embedding: EmbeddingConfig
    models: ServedModels
    prompt_workers: PromptWorkers | None = None  # none: everything is read in this process
    answer_format: AnswerFormat = field(default_factory=AnswerFormat)
    field_log: FieldLog = field(default_factory=FieldLog)
    running: RunningAnswers = field(default_factory=RunningAnswers)

    async def read_body(self, scope: Scope, receive: Receive) -> bytes:
        """A request's body. Raises ``HttpError`` and ``ClientGoneError``."""
        async with self.gate.arriving():
            return await read_body(scope, receive, max_bytes=self.config.max_body_bytes)

    def sse_options(
        self, scope: Scope, headers: Mapping[str, str], guard: DisconnectGuard | None = None
    ) -> SseOptions:
        """What the config says of a streamed response, and where it goes."""
        return {
            "headers": headers,
            "ping_interval_s": self.config.ping_interval_s,
            "raw_send": scope[RAW_SEND],
            "stall_timeout_s": self.config.streams.stall_timeout_s,
            "on_stall": self.metrics.reader_stalled,
            "guard": guard,
        }

    def check_unknown(self, names: Sequence[str]) -> None:
        """Log fields that nobody knows, or refuse them: the config says which."""
        if names and self.config.strict_fields:
            raise InvalidParameterError(
                f"Unknown fields: {ignored_fields_header(names)} (the server runs with "
                "--strict-fields)",
                param=names[0][:64],
                code="unknown_parameter",
            )
        for name in names:
            self.field_log.unknown(name)
