"""``AsyncLLM``: a model in this process, asked from an event loop."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from streamserve.api.chat_request import read_template_kwargs
from streamserve.core.sampling_params import SamplingParams as CoreSamplingParams
from streamserve.engine.async_engine import AsyncEngine
from streamserve.llm.answers import ChatOptions
from streamserve.llm.build import build
from streamserve.llm.lora_request import LoRARequest
from streamserve.llm.outputs import EmbeddingRequestOutput, RequestOutput
from streamserve.llm.pooling_params import PoolingParams
from streamserve.llm.prompts import Job, Message, Prompt, read_conversations, read_prompts
from streamserve.llm.sampling_params import SamplingParams


class AsyncLLM:
    """Takes what `LLM` takes, and runs on the event loop that first asks it.

        async with AsyncLLM("./my-llama") as llm:
            async for output in llm.generate("Hello", SamplingParams(max_tokens=20)):
                print(output.outputs[0].text)

    Making one loads the model, which blocks. ``engine`` is the `AsyncEngine` underneath, whose own
    ``generate`` yields what is new instead of all so far.

    Raises ``ConfigError``, ``ModelLoadError`` or ``KVCacheMemoryError``.
    """

    def __init__(self, model: str | None = None, **keywords: Any) -> None:
        service, self._answers = build(model, {"seed": 0, **keywords})
        self.engine: AsyncEngine = service.engine
        self._sampling_defaults = service.sampling_defaults
        self._embedding = service.embedding
        self._request_ids = itertools.count()
        self._is_started = False

    async def start(self) -> None:
        """Start the step loop on this event loop, unless it runs; requests do so themselves."""
        if not self._is_started:
            self._is_started = True
            await self.engine.start()

    def generate(
        self,
        prompt: Prompt,
        sampling_params: CoreSamplingParams | None = None,
        request_id: str | None = None,
        *,
        lora_request: LoRARequest | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput]:
        """Yield the answer so far whenever there is more of it, the last one ``finished``.

        Leaving the loop early ends the request. Raises ``RequestError`` before the first output
        and ``EngineError`` if the request fails.
        """
        [read] = read_prompts(prompt)
        job = self._job(read, sampling_params, request_id, priority, lora_request)
        return self._growing(job, ChatOptions())

    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: CoreSamplingParams | None = None,
        request_id: str | None = None,
        *,
        lora_request: LoRARequest | None = None,
        priority: int = 0,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> AsyncGenerator[RequestOutput]:
        """Continue a conversation by the model's chat template. As ``generate`` in all else."""
        [read] = read_conversations(messages)
        job = self._job(read, sampling_params, request_id, priority, lora_request)
        kwargs = read_template_kwargs("chat_template_kwargs", chat_template_kwargs or {})
        return self._growing(job, ChatOptions(kwargs=kwargs))

    async def embed(
        self,
        prompt: Prompt,
        pooling_params: PoolingParams | None = None,
        request_id: str | None = None,
        *,
        lora_request: LoRARequest | None = None,
        priority: int = 0,
    ) -> EmbeddingRequestOutput:
        """The vector of one prompt. Cancelling ends the request."""
        [read] = read_prompts(prompt)
        params = (pooling_params or PoolingParams()).request(self._embedding)
        await self.start()
        return await self._answers.vector(
            self._job(read, params, request_id, priority, lora_request)
        )

    def abort(self, request_id: str) -> bool:
        """End a request; whoever reads it gets ``EngineError``. Whether there was one."""
        return self.engine.abort(request_id)

    async def close(self) -> None:
        """Stop the engine and free the model. Idempotent."""
        await self.engine.stop()
        self._answers.close()

    async def __aenter__(self) -> AsyncLLM:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    def _job(
        self,
        prompt: Any,
        params: CoreSamplingParams | None,
        request_id: str | None,
        priority: int,
        lora_request: LoRARequest | None,
    ) -> Job:
        params = params or SamplingParams(**self._sampling_defaults)
        request_id = request_id or str(next(self._request_ids))
        return Job(0, request_id, prompt, params, priority, lora_request=lora_request)

    async def _growing(self, job: Job, options: ChatOptions) -> AsyncGenerator[RequestOutput]:
        await self.start()
        async with aclosing(self._answers.growing(job, options)) as outputs:
            async for output in outputs:
                yield output
