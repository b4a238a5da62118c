"""``POST /v1/embeddings``: a vector for each input, each a request of its own in the engine."""

from __future__ import annotations

import asyncio
import base64
import secrets
import sys
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import orjson

from streamserve.api.admitted import Call
from streamserve.api.disconnect import ClientGoneError
from streamserve.api.extras import Prompt
from streamserve.api.generation import GenerationEndpoint
from streamserve.api.metrics import Delivery
from streamserve.api.prompts import Prepared
from streamserve.api.rate_limits import Allowance, allowance_of
from streamserve.api.success import check_success
from streamserve.api.tenants import tenant_of
from streamserve.core.request import FinishReason
from streamserve.core.sampling_params import SamplingParams
from streamserve.engine.async_engine import AsyncEngine
from streamserve.engine.intake import Origin
from streamserve.engine.stream import RequestStream
from streamserve.errors import (
    ContextLengthError,
    EngineError,
    InvalidParameterError,
    QueueFullError,
)

_AT_ONCE = 64
"""Inputs of one body that are in the engine together; the rest wait here, not in its queue."""


class EmbeddingEndpoint(GenerationEndpoint):
    """Reads and tokenises as those that generate, and answers with vectors."""

    endpoint = "embedding"

    async def _settled(self, prepared: Prepared) -> Prepared:
        prepared = await super()._settled(prepared)
        pooling = prepared.params.pooling
        assert pooling is not None
        pooling = pooling.settled(self._context.embedding)
        prepared = replace(prepared, params=replace(prepared.params, pooling=pooling))
        is_one = len(prepared.prompts) == 1
        for index, prompt in enumerate(prepared.prompts):
            self._check(prompt, prepared.params, "input" if is_one else f"input[{index}]")
        return prepared

    def _check(self, prompt: Prompt, params: SamplingParams, name: str) -> None:
        """Raise what the engine has against an input, in the name that it has here."""
        try:
            self._context.engine.check(prompt.token_ids, params, is_tokenized=prompt.is_tokenized)
        except ContextLengthError as error:
            raise ContextLengthError(f"{name}: {error}", param="input") from None
        except InvalidParameterError as error:
            message = str(error).replace("prompt", name, 1)
            raise InvalidParameterError(message, param="input") from None

    async def _answer(self, prepared: Prepared, call: Call) -> None:
        context = self._context
        request_id = f"embd-{secrets.token_hex(16)}"
        delivery = Delivery(context.metrics, context.clock, call.arrival_time)
        allowance = allowance_of(call.scope)
        vectors = _Vectors(
            context.engine,
            prepared,
            lambda index: self._origin(prepared, index, call, request_id),
            allowance,
        )
        if allowance is not None:
            allowance.take_tokens([len(prompt.token_ids) for prompt in prepared.prompts])
        try:
            vectors.start()
        except BaseException as error:
            vectors.close()
            if isinstance(error, EngineError):
                context.metrics.refused(error.status)
            raise
        token_ids = [prompt.token_ids for prompt in prepared.prompts]
        context.request_log.admitted(
            request_id, call.scope, token_ids, prepared.params, is_streamed=False
        )
        reason = FinishReason.ABORT
        try:
            await vectors.finish()
            content = self._content(prepared, request_id, vectors.items)
            await call.send_json(content, prepared.common.unknown_fields)
            reason = FinishReason.STOP
        except ClientGoneError:
            raise
        except Exception:
            reason = FinishReason.ERROR
            raise
        finally:
            vectors.close()
            delivery.end(reason)
            num_prompts = len(vectors.streams)
            context.request_log.ended(request_id, vectors.streams, num_prompts)
            context.metrics.tenants.ended(tenant_of(call.scope).name, vectors.streams, num_prompts)

    def _content(self, prepared: Prepared, request_id: str, items: list[bytes]) -> bytes:
        num_tokens = sum([len(prompt.token_ids) for prompt in prepared.prompts])
        rest = orjson.dumps(
            {
                "id": request_id,
                "object": "list",
                "created": int(self._context.wall_clock()),
                "model": prepared.common.model or self._context.config.served_model_names[0],
                "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
            }
        )
        return b"".join([b'{"data":[', b",".join(items), b"],", rest[1:]])


class _Vectors:
    """The inputs of one body on their way through the engine, and what has come of them.

    Each vector is written as JSON when it comes: all at once they would hold up the streams.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        prepared: Prepared,
        origin: Callable[[int], Origin],
        allowance: Allowance | None,
    ) -> None:
        self._engine = engine
        self._work = prepared
        self._origin = origin
        self._allowance = allowance
        self._encode = _base64_item if prepared.encoding_format == "base64" else _float_item
        self._waiting = deque(range(len(prepared.prompts)))
        self._live: dict[int, RequestStream] = {}
        self.streams: list[RequestStream] = []
        self.items = [b""] * len(prepared.prompts)

    def start(self) -> None:
        """Submit the first input: what it raises is the answer."""
        self._submit()

    async def finish(self) -> None:
        """Return when all have their vectors. Raises ``EngineError`` for the first that has not."""
        try:
            async with asyncio.TaskGroup() as group:
                for index in list(self._live):
                    group.create_task(self._work_on(index))
                for _ in range(min(len(self._waiting), _AT_ONCE - 1)):
                    group.create_task(self._work_on())
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    def close(self) -> None:
        """End what has not ended. Idempotent."""
        for stream in self.streams:
            stream.close()
        if self._allowance is not None:
            self._allowance.close()

    async def _work_on(self, index: int | None = None) -> None:
        """Read the vector of ``index``, which was submitted, then see to the next that waits."""
        while True:
            if index is not None:
                await self._read(index)
            if not self._waiting:
                return
            try:
                index = self._submit()
            except QueueFullError:
                if self._live:
                    return  # whoever reads one of those goes on with the rest
                raise

    def _submit(self) -> int:
        index = self._waiting[0]
        token_ids = self._work.prompts[index].token_ids
        stream = self._engine.submit(token_ids, self._work.params, **self._origin(index))
        if self._allowance is not None:
            stream.on_scheduled = partial(self._allowance.settle, index)
        self._waiting.popleft()
        self._live[index] = stream
        self.streams.append(stream)
        return index

    async def _read(self, index: int) -> None:
        output = await self._live[index].get()
        check_success(output)
        assert output.embedding is not None
        self.items[index] = self._encode(index, output.embedding)
        del self._live[index]


def _float_item(index: int, vector: array[float]) -> bytes:
    return orjson.dumps({"object": "embedding", "index": index, "embedding": vector.tolist()})


def _base64_item(index: int, vector: array[float]) -> bytes:
    """Float32, the lowest byte first, as OpenAI's client reads it."""
    if sys.byteorder == "big":
        vector = array("f", vector)
        vector.byteswap()
    text = base64.b64encode(vector).decode()
    return orjson.dumps({"object": "embedding", "index": index, "embedding": text})
