"""``POST /v1/chat/completions`` and ``/v1/completions``: one request, from its bytes to its answer.

Each endpoint is an ASGI application, so that one function sees the whole of a request's life: what
it takes (a place, the engine's streams) it gives back there, whatever happens.
"""

from __future__ import annotations

import asyncio
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from streamserve.api.answer_plan import AnswerPlan
from streamserve.api.body import ignored_fields_header, parse_json_object, read_body
from streamserve.api.chat_request import parse_chat_request
from streamserve.api.completion_request import parse_completion_request
from streamserve.api.context import ApiContext
from streamserve.api.disconnect import ClientGoneError, DisconnectGuard
from streamserve.api.errors import HttpError
from streamserve.api.frames import (
    CHAT,
    COMPLETION,
    Choice,
    ChoiceFrames,
    Envelope,
    Kind,
    whole_answer,
)
from streamserve.api.metrics import Delivery
from streamserve.api.parsed_frames import ParsedFrames, parse_choice
from streamserve.api.prompts import (
    LONG_BODY,
    Endpoint,
    Prompt,
    PromptWorkers,
    Work,
    chat_work,
)
from streamserve.api.sampling import Common
from streamserve.api.sse import AnswerStream, StreamedChoice, check_success
from streamserve.core.plan import TokenLogprobs
from streamserve.core.request import FinishReason
from streamserve.engine.parsers.answer import AnswerParser
from streamserve.engine.stream import RequestStream
from streamserve.errors import ContextLengthError, EngineError, InvalidParameterError, RequestError

RAW_SEND = "streamserve.raw_send"
"""In the scope: the server's own ``send``, which passes no middleware."""


class GenerationEndpoint(ABC):
    """What the two endpoints share: everything but the parsing of the body."""

    kind: Kind
    prompt_param: str
    endpoint: Endpoint

    def __init__(self, context: ApiContext) -> None:
        self._context = context

    async def prepare(self, raw: bytes) -> Work:
        """Parse, render and tokenise. Raises ``RequestError``, ``EngineError``."""
        workers = self._context.prompt_workers
        if workers is not None and len(raw) > LONG_BODY:
            return await self._prepare_elsewhere(workers, raw)
        return await self._prepare_here(raw)

    @abstractmethod
    async def _prepare_here(self, raw: bytes) -> Work:
        """As ``prepare``, for what is short."""

    async def _prepare_elsewhere(self, workers: PromptWorkers, raw: bytes) -> Work:
        work = await workers.read(self.endpoint, raw)
        self.check_common(work.common)
        return work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context = self._context
        arrival_time = context.clock()
        try:
            with context.gate.enter():
                await self._serve(scope, receive, send, arrival_time)
        except ClientGoneError:
            return
        except RequestError as exc:
            context.metrics.refused(exc.status)
            raise

    async def _serve(self, scope: Scope, receive: Receive, send: Send, arrival_time: float) -> None:
        context = self._context
        raw = await read_body(scope, receive, max_bytes=context.config.max_body_bytes)
        work = await self.prepare(raw)
        del raw
        if work.params.structured_output is not None:
            await context.engine.prepare(work.params)
        envelope = Envelope(
            kind=self.kind,
            id=self.kind.id_prefix + secrets.token_hex(16),
            created=int(context.wall_clock()),
            model=work.common.model or context.config.served_model_names[0],
        )
        headers = self._headers(work.common)
        deliveries = [Delivery(context.metrics, context.clock, arrival_time) for _ in work.prompts]
        streams = self._submit(work, envelope.id, arrival_time)
        try:
            if work.common.stream:
                answer = self._answer_stream(scope, work, envelope, streams, deliveries, headers)
                await answer(scope, receive, send)
            else:
                async with DisconnectGuard(receive):
                    choices = await _collect_all(streams, work, context.tokenizer.token_bytes)
                logprobs_of = context.tokenizer if work.params.logprobs is not None else None
                content = whole_answer(envelope, choices, logprobs_of=logprobs_of)
                response = Response(content, headers=headers, media_type="application/json")
                await response(scope, receive, send)
                for choice, delivery in zip(choices, deliveries, strict=True):
                    delivery.end(choice.finish_reason)
        except ClientGoneError:
            raise
        except Exception:
            for delivery in deliveries:
                delivery.end(FinishReason.ERROR)
            raise
        finally:
            for stream, delivery in zip(streams, deliveries, strict=True):
                stream.close()
                delivery.end(FinishReason.ABORT)  # unless it has ended already

    def _submit(self, work: Work, request_id: str, arrival_time: float) -> list[RequestStream]:
        """Hand all prompts to the engine, or none."""
        streams: list[RequestStream] = []
        try:
            for index, prompt in enumerate(work.prompts):
                streams.append(
                    self._context.engine.submit(
                        prompt.token_ids,
                        work.params,
                        request_id=f"{request_id}-{index}" if index else request_id,
                        priority=work.common.priority,
                        cache_salt=work.common.cache_salt,
                        arrival_time=arrival_time,
                        is_tokenized=prompt.is_tokenized,
                    )
                )
        except BaseException as exc:
            for stream in streams:
                stream.close()
            if isinstance(exc, EngineError):
                self._context.metrics.refused(exc.status)
            if isinstance(exc, ContextLengthError) and exc.param == "messages":
                exc.param = self.prompt_param
            raise
        return streams

    def _answer_stream(
        self,
        scope: Scope,
        work: Work,
        envelope: Envelope,
        streams: Sequence[RequestStream],
        deliveries: Sequence[Delivery],
        headers: dict[str, str],
    ) -> AnswerStream:
        options = work.common.stream_options
        logprobs_of = self._context.tokenizer if work.params.logprobs is not None else None
        parsing = work.parsing
        choices = [
            StreamedChoice(
                stream,
                _frames(
                    None if parsing is None else parsing.new(self._context.tokenizer.token_bytes),
                    envelope,
                    index,
                    include_usage=options.include_usage,
                    continuous_usage=options.continuous_usage_stats,
                    logprobs_of=logprobs_of,
                ),
                delivery,
                echo=prompt.echo,
            )
            for index, (stream, delivery, prompt) in enumerate(
                zip(streams, deliveries, work.prompts, strict=True)
            )
        ]
        return AnswerStream(
            envelope,
            choices,
            include_usage=options.include_usage,
            headers=headers,
            ping_interval_s=self._context.config.ping_interval_s,
            raw_send=scope[RAW_SEND],
        )

    def _headers(self, common: Common) -> dict[str, str]:
        if not common.unknown_fields:
            return {}
        return {"X-Ignored-Fields": ignored_fields_header(common.unknown_fields)}

    def check_common(self, common: Common) -> None:
        """Check what only the server's config can say."""
        config = self._context.config
        check_model(common.model, config.served_model_names)
        if common.priority and not config.honours_priority:
            raise InvalidParameterError(
                f"priority must be 0 unless requests are scheduled by it, got {common.priority}",
                param="priority",
                code="unsupported_parameter",
            )
        if not common.unknown_fields:
            return
        if config.strict_fields:
            names = ignored_fields_header(common.unknown_fields)
            raise InvalidParameterError(
                f"Unknown fields: {names} (the server runs with --strict-fields)",
                param=common.unknown_fields[0][:64],
                code="unknown_parameter",
            )
        for name in common.unknown_fields:
            self._context.field_log.unknown(name)


class ChatEndpoint(GenerationEndpoint):
    """``POST /v1/chat/completions``."""

    kind = CHAT
    prompt_param = "messages"
    endpoint = "chat"

    async def _prepare_here(self, raw: bytes) -> Work:
        request = parse_chat_request(parse_json_object(raw), self._context.sampling_defaults)
        workers = self._context.prompt_workers
        if workers is not None and request.chat_template_kwargs:
            # A template may run away with what a client gives it: a process can be killed.
            return await self._prepare_elsewhere(workers, raw)
        self.check_common(request.common)
        plan = AnswerPlan(request, self._context.answer_format)
        prompt = await self._context.preprocessor.chat(plan.messages, **plan.rendering)
        return chat_work(request, plan, prompt, self._context.mark_ids)


class CompletionEndpoint(GenerationEndpoint):
    """``POST /v1/completions``."""

    kind = COMPLETION
    prompt_param = "prompt"
    endpoint = "completion"

    async def _prepare_here(self, raw: bytes) -> Work:
        request = parse_completion_request(parse_json_object(raw), self._context.sampling_defaults)
        self.check_common(request.common)
        prompts: list[Prompt] = []
        for prompt in request.prompts:
            if isinstance(prompt, str):
                token_ids = await self._context.preprocessor.encode(
                    prompt, add_special_tokens=request.add_special_tokens
                )
                prompts.append(Prompt(token_ids, prompt if request.echo else ""))
            else:
                echo = self._context.tokenizer.decode(prompt) if request.echo else ""
                prompts.append(Prompt(prompt, echo, is_tokenized=False))
        return Work(request.common, request.params, prompts)


def check_model(model: str | None, served: Sequence[str]) -> None:
    """Raise 404 unless ``model`` is one of ours. Naming none means the only one there is."""
    if model is not None and model not in served:
        raise HttpError(
            404,
            f"The model {model[:256]!r} does not exist; this server has {', '.join(served)}",
            param="model",
            code="model_not_found",
        )


def _frames(
    parser: AnswerParser | None, envelope: Envelope, index: int, **options: Any
) -> ChoiceFrames:
    if parser is None:
        return ChoiceFrames(envelope, index, **options)
    return ParsedFrames(envelope, index, parser, **options)


async def _collect(stream: RequestStream, echo: str, parser: AnswerParser | None) -> Choice:
    texts = [echo]
    logprobs: list[TokenLogprobs] = []
    while True:
        output = await stream.get()
        texts.append(output.text)
        logprobs += output.logprobs
        if parser is not None:
            parser.count(output.token_ids)
        if output.finish_reason is not None:
            check_success(output)
            choice = Choice("".join(texts), output.finish_reason, output.usage, logprobs)
            if parser is not None:
                parse_choice(choice, parser)
            return choice


async def _collect_all(
    streams: Sequence[RequestStream], work: Work, token_bytes: Callable[[int], bytes]
) -> list[Choice]:
    parsing = work.parsing
    reads = [
        _collect(stream, prompt.echo, None if parsing is None else parsing.new(token_bytes))
        for stream, prompt in zip(streams, work.prompts, strict=True)
    ]
    if len(reads) == 1:
        return [await reads[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(read) for read in reads]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]
