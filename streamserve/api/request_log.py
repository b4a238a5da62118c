"""Two lines for a request: when the engine has taken it, and when it has ended."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from starlette.types import Scope

from streamserve.api.traces import RequestTraces
from streamserve.core.sampling_params import SamplingParams
from streamserve.engine.stream import RequestStream
from streamserve.engine.tokenizer import Tokenizer

logger = logging.getLogger("streamserve.requests")


class RequestLog:
    """Writes to the logger ``streamserve.requests``; of a prompt's text only what it is told to.

    ``max_characters`` of the prompt are shown, and not one more is decoded than they need.
    """

    def __init__(self, tokenizer: Tokenizer, *, is_on: bool, max_characters: int) -> None:
        self._tokenizer = tokenizer
        self._max_characters = max_characters
        self.is_on = is_on
        self.traces: RequestTraces | None = None

    def admitted(
        self,
        request_id: str,
        scope: Scope,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        *,
        is_streamed: bool,
    ) -> None:
        """The engine has queued the request: one choice or more, headers not yet sent."""
        if self.traces is not None:
            self.traces.admitted(request_id, scope)
        if not self.is_on:
            return
        client = scope.get("client")
        limit = "the rest of the context" if params.max_tokens is None else params.max_tokens
        http_request_id = scope.get("state", {}).get("request_id", "none")
        num_prompt_tokens = sum(map(len, prompts))
        logger.info(
            "%s admitted: client %s, header id %s, %d prompt tokens%s, %s, max_tokens %s, "
            "temperature %g%s",
            request_id,
            f"{client[0]}:{client[1]}" if client else "unknown",
            http_request_id,
            num_prompt_tokens,
            f" in {len(prompts)} prompts" if len(prompts) > 1 else "",
            "streamed" if is_streamed else "whole",
            limit,
            params.temperature,
            self._shown(prompts[0]),
            extra={
                "event": "admitted",
                "request_id": request_id,
                "http_request_id": http_request_id,
                "prompt_tokens": num_prompt_tokens,
            },
        )

    def ended(self, request_id: str, streams: Sequence[RequestStream], num_prompts: int) -> None:
        """All of the request's streams, as many for each prompt, are closed."""
        reason = "/".join(dict.fromkeys(_reason(stream) for stream in streams))
        if self.traces is not None:
            self.traces.ended(request_id, reason, streams)
        if not self.is_on:
            return
        of_prompts = streams[:: len(streams) // num_prompts]  # candidates share what they read
        usages = [stream.usage for stream in streams if stream.usage is not None]
        timings = [stream.timings for stream in streams]
        arrival = min(times.arrival for times in timings)
        first = min((t.first_token for t in timings if t.first_token is not None), default=None)
        last = max((t.finished for t in timings if t.finished is not None), default=arrival)
        numbers = {
            "prompt_tokens": sum(stream.num_prompt_tokens for stream in of_prompts),
            "cached_tokens": sum(s.usage.cached_tokens for s in of_prompts if s.usage is not None),
            "output_tokens": sum(usage.completion_tokens for usage in usages),
            "first_token_ms": None if first is None else round((first - arrival) * 1e3, 1),
            "total_ms": round((last - arrival) * 1e3, 1),
        }
        logger.info(
            "%s ended: %s, %d prompt tokens of which %d cached, %d output tokens, first after %s, "
            "%.0f ms in all",
            request_id,
            reason,
            numbers["prompt_tokens"],
            numbers["cached_tokens"],
            numbers["output_tokens"],
            "no time" if first is None else f"{(first - arrival) * 1e3:.0f} ms",
            (last - arrival) * 1e3,
            extra={"event": "ended", "request_id": request_id, "reason": reason, **numbers},
        )

    def _shown(self, prompt: list[int]) -> str:
        if not self._max_characters:
            return ""
        ids = prompt[: self._max_characters]  # a token has a character, or part of one
        text = self._tokenizer.decode(ids, skip_special_tokens=False)
        return f", prompt {text[: self._max_characters]!r}"


def _reason(stream: RequestStream) -> str:
    return "error" if stream.finish_reason is None else stream.finish_reason.value
