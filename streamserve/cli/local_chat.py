"""``streamserve chat`` without a server: the same engine, asked directly."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import aclosing

from streamserve.api.chat_request import parse_chat_request
from streamserve.api.harmony_plan import plan_answer
from streamserve.cli.compose import Service
from streamserve.cli.terminal import Piece
from streamserve.core.request import FinishReason
from streamserve.engine.parsers.answer_format import MarkIds, choose_answer_format
from streamserve.engine.parsers.events import Content, Event, Reasoning
from streamserve.engine.preprocess import Preprocessor
from streamserve.errors import EngineError


class LocalBackend:
    """Answers from an engine in this process, read as the server reads them."""

    def __init__(self, service: Service, options: Mapping[str, object]) -> None:
        self.name = service.model_name
        self._engine = service.engine
        self._preprocessor = Preprocessor(service.tokenizer, service.chat_template)
        self._token_bytes = service.tokenizer.token_bytes
        self._marks = MarkIds(service.tokenizer)
        self._format = choose_answer_format(service.chat_template)
        self._defaults = service.sampling_defaults
        self._options = dict(options)
        self._ids = itertools.count()

    async def start(self) -> None:
        """Start the step loop on the running event loop."""
        await self._engine.start()

    async def answer(self, messages: list[dict[str, str]]) -> AsyncIterator[Piece]:
        """Yield the answer as it comes; leaving early aborts it."""
        body = {"messages": messages, **self._options}
        plan = plan_answer(parse_chat_request(body, self._defaults), self._format)
        prompt = await self._preprocessor.chat(plan.messages, **plan.rendering)
        parsing = plan.parsing(prompt.text)
        parser = None if parsing is None else parsing.new(self._token_bytes)
        params = plan.params(prompt.text, self._marks)
        stream = self._engine.submit(prompt.token_ids, params, request_id=f"chat-{next(self._ids)}")
        async with aclosing(stream):
            async for output in stream:
                text = output.text
                for piece in [Piece(text)] if parser is None else _pieces(parser.feed(text)):
                    yield piece
                if output.finish_reason is FinishReason.ABORT:
                    raise EngineError("the answer was cut off")
        for piece in [] if parser is None else _pieces(parser.finish()):
            yield piece

    async def close(self) -> None:
        """Stop the engine."""
        await self._engine.stop()
        self._preprocessor.close()


def _pieces(events: Iterable[Event]) -> list[Piece]:
    return [
        Piece(event.text, isinstance(event, Reasoning))
        for event in events
        if isinstance(event, (Content, Reasoning))
    ]
