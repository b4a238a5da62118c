"""``streamserve chat`` without a server: the same engine, asked directly."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing

from streamserve.cli.compose import Service
from streamserve.core.request import FinishReason
from streamserve.core.sampling_params import SamplingParams
from streamserve.engine.preprocess import Preprocessor
from streamserve.errors import EngineError


class LocalBackend:
    """Answers from an engine in this process."""

    def __init__(self, service: Service, options: Mapping[str, object]) -> None:
        self.name = service.model_name
        self._engine = service.engine
        self._preprocessor = Preprocessor(service.tokenizer, service.chat_template)
        fields: dict[str, object] = {"max_tokens": None, **service.sampling_defaults, **options}
        self._params = SamplingParams(**fields)  # type: ignore[arg-type]
        self._ids = itertools.count()

    async def start(self) -> None:
        """Start the step loop on the running event loop."""
        await self._engine.start()

    async def answer(self, messages: list[dict[str, str]]) -> AsyncIterator[str]:
        """Yield the answer's text as it comes; leaving early aborts it."""
        prompt = await self._preprocessor.chat(messages)
        stream = self._engine.submit(
            prompt.token_ids, self._params, request_id=f"chat-{next(self._ids)}"
        )
        async with aclosing(stream):
            async for output in stream:
                if output.text:
                    yield output.text
                if output.finish_reason is FinishReason.ABORT:
                    raise EngineError("the answer was cut off")

    async def close(self) -> None:
        """Stop the engine."""
        await self._engine.stop()
        self._preprocessor.close()
