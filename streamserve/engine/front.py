"""How requests come into an engine: checked, made and queued between two steps of its loop."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from typing import Unpack

from streamserve.core.sampling_params import BeamSearchParams, SamplingParams
from streamserve.core.scheduler import Scheduler
from streamserve.engine.deadlines import Deadlines
from streamserve.engine.failures import duplicate
from streamserve.engine.grammar import Grammars
from streamserve.engine.grammar_masks import GrammarMasks
from streamserve.engine.intake import Intake, Origin
from streamserve.engine.live import Live
from streamserve.engine.outputs import RequestOutput
from streamserve.engine.stream import RequestStream
from streamserve.engine.tokenizer import Tokenizer
from streamserve.errors import EngineDeadError, RequestError


class EngineFront(ABC):
    """The half of an engine that its callers talk to first; the step loop is the other.

    Event-loop thread only.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        tokenizer: Tokenizer,
        grammars: Grammars,
        intake: Intake,
        masks: GrammarMasks,
    ) -> None:
        self._scheduler = scheduler
        self._tokenizer = tokenizer
        self._grammars = grammars
        self._intake = intake
        self._masks = masks
        self._live: dict[str, Live] = {}
        self._wake = asyncio.Event()  # there may be work again
        self._deadlines = Deadlines()
        self._is_stopping = False
        self._num_beam_groups = 0
        self._num_generated = 0  # ids given by ``generate``

    @abstractmethod
    def _die(self, reason: str, cause: BaseException | None) -> None:
        """End every stream: the engine cannot go on."""

    @abstractmethod
    def _raise_if_dead(self) -> None:
        """Raise ``EngineDeadError`` if that has been."""

    async def prepare(self, params: SamplingParams) -> None:
        """Compile what ``submit`` needs; to be awaited just before it where there is a grammar.

        Raises ``InvalidParameterError`` for a grammar that cannot be used.
        """
        if params.structured_output is not None:
            await self._grammars.compile(params.structured_output)

    async def generate(
        self,
        prompt: str | list[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput]:
        """Yield what is new of the answer as it comes, the last output with a ``finish_reason``.

            async for output in engine.generate("Once upon a time", SamplingParams(max_tokens=50)):
                print(output.text, end="", flush=True)

        Leaving the loop early ends the request, and its blocks are free by the next step. Raises
        as ``submit`` before the first output, and ``EngineError`` if the request fails.
        """
        if isinstance(prompt, str):
            prompt = await asyncio.to_thread(
                self._tokenizer.encode, prompt, add_special_tokens=True
            )
        await self.prepare(params)
        self._num_generated += 1
        request_id = request_id or f"generate-{self._num_generated}"
        async with self.submit(prompt, params, request_id=request_id, priority=priority) as stream:
            async for output in stream:
                yield output

    def uses_adapter(self, slot: int) -> bool:
        """Whether a request has this adapter, or a step in flight."""
        return self._scheduler.uses_adapter(slot)

    def check(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        beams: BeamSearchParams | None = None,
        n: int = 1,
        *,
        is_tokenized: bool = False,
    ) -> SamplingParams:
        """Return ``params`` with everything settled, or raise what ``submit`` would.

        That is ``InvalidParameterError`` or ``ContextLengthError``; the queue is not looked at.
        With ``beams``, as ``submit_beams`` would.
        """
        params = self._intake.checked(prompt_token_ids, params, is_tokenized)
        self._scheduler.check_fits(len(prompt_token_ids), params)
        if beams is not None:
            self._intake.check_beams(params, beams, n)
        return params

    def submit(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        choice_index: int = 0,
        **origin: Unpack[Origin],
    ) -> RequestStream:
        """Queue a request, or say why not before anything is queued.

        ``is_tokenized``: the ids come from the engine's own tokenizer.
        ``params.max_tokens`` of ``None`` means the rest of the context. ``prepare`` comes first if
        there is a ``params.structured_output``. Raises ``InvalidParameterError``,
        ``ContextLengthError``, ``QueueFullError``, ``DeadlineUnreachableError`` or
        ``EngineDeadError`` (also when the engine is stopping).
        """
        self._check_open(origin["request_id"])
        live = self._intake.one(prompt_token_ids, params, choice_index, **origin)
        self._enter(live)
        return live.stream

    def submit_choices(
        self, prompt_token_ids: list[int], params: SamplingParams, n: int, **origin: Unpack[Origin]
    ) -> list[RequestStream]:
        """Queue ``n`` requests with one prompt, which is computed once; raises as ``submit``.

        Each has its own stream, and with a seed the answer of its ``choice_index`` in any company.
        """
        self._check_open(origin["request_id"])
        first = self._intake.one(prompt_token_ids, params, 0, **origin)
        others = self._intake.others(first, n)
        for live in others:
            self._check_open(live.request.request_id)
        self._enter(first)
        try:
            self._scheduler.add_choices(first.request, [live.request for live in others])
        except ValueError as error:
            first.stream.close()
            raise duplicate(origin["request_id"]) from error
        for live in others:
            self._book(live)
        return [live.stream for live in (first, *others)]

    def submit_beams(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        beams: BeamSearchParams,
        n: int,
        **origin: Unpack[Origin],
    ) -> list[RequestStream]:
        """Queue a beam search for the best ``n`` answers, best first; raises as ``submit``.

        Each stream gets one output, at the end; closing one of them ends the search. Of ``params``
        only what ends an answer, and what is reported of it, has a meaning.
        """
        self._check_open(origin["request_id"])
        group = self._intake.beams(prompt_token_ids, params, beams, n, **origin)
        self._enter(group)
        self._num_beam_groups += 1
        return list(group.streams)

    def hold(self, request_id: str, is_full: bool) -> None:
        """Whether a request's reader has no room for more: nothing is generated for it then."""
        live = self._live.get(request_id)
        if live is None:
            return
        set_held = self._scheduler.pause if is_full else self._scheduler.resume
        try:
            set_held(live.request)
        except Exception as error:
            self._die("the scheduler failed to pause or resume a request", error)
        self._wake.set()

    def _check_open(self, request_id: str) -> None:
        self._raise_if_dead()
        if self._is_stopping:
            raise EngineDeadError("the server is shutting down and takes no new requests")
        if request_id in self._live:
            raise duplicate(request_id)

    def _enter(self, live: Live) -> None:
        """Queue what was made of a request."""
        request = live.request
        try:
            self._scheduler.add(request)
        except RequestError:
            raise
        except ValueError as error:  # the id's last step has not retired
            raise duplicate(request.request_id) from error
        except Exception as error:
            self._die("the scheduler failed to add a request", error)
            self._raise_if_dead()
        self._book(live)
        self._wake.set()

    def _book(self, live: Live) -> None:
        self._live[live.request.request_id] = live
        if live.request.time_limits is not None:
            self._deadlines.add(live)
        if live.matcher is not None or live.request.sampling_params.thinking is not None:
            self._masks.add(live.request, live.matcher)
