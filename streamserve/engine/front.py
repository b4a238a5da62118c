"""How requests come into an engine and leave it, between two steps of its loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Unpack

from streamserve.core.clock import Clock
from streamserve.core.request import FinishReason
from streamserve.core.sampling_params import BeamSearchParams, SamplingParams
from streamserve.core.scheduler import Scheduler
from streamserve.engine.deadlines import Deadlines
from streamserve.engine.failures import duplicate, name_of
from streamserve.engine.grammar import Grammars
from streamserve.engine.grammar_masks import GrammarMasks
from streamserve.engine.intake import Intake, Origin
from streamserve.engine.live import BeamGroup, Live
from streamserve.engine.outputs import RequestOutput
from streamserve.engine.stream import RequestStream
from streamserve.engine.tokenizer import Tokenizer
from streamserve.errors import EngineDeadError, RequestError

logger = logging.getLogger(__name__)


class EngineFront:
    """The book of what an engine serves: how it is entered, and each way out of it.

    The step loop is the other half (``AsyncEngine``). Event-loop thread only.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        tokenizer: Tokenizer,
        grammars: Grammars,
        intake: Intake,
        masks: GrammarMasks,
        clock: Clock,
    ) -> None:
        self._scheduler = scheduler
        self._tokenizer = tokenizer
        self._grammars = grammars
        self._intake = intake
        self._masks = masks
        self._clock = clock
        self._live: dict[str, Live] = {}
        self._wake = asyncio.Event()  # there may be work again
        self._deadlines = Deadlines()
        self._is_stopping = False
        self._died = asyncio.Event()
        self._has_failed_requests = False
        self._dead_reason: str | None = None
        self._num_beam_groups = 0
        self._num_preemptions = 0  # of requests that have ended
        self._num_generated = 0  # ids given by ``generate``

    async def prepare(self, params: SamplingParams) -> None:
        """Compile what ``submit`` needs; to be awaited just before it where there is a grammar.

        Raises ``InvalidParameterError`` for a grammar that cannot be used.
        """
        if params.structured_output is not None:
            await self._grammars.compile(params.structured_output)

    def is_prepared(self, params: SamplingParams) -> bool:
        """Whether ``submit`` may come now: others' grammars make room for each other."""
        return params.structured_output is None or params.structured_output in self._grammars

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

    def abort(self, request_id: str) -> bool:
        """End a request with ``ABORT``; its blocks are free by the next step.

        Returns whether there was one to end.
        """
        live = self._live.get(request_id)
        if live is None:
            return False
        if self._finish(live, FinishReason.ABORT):
            self._end(live)
            live.abort()
            self._wake.set()
        return True

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

    @property
    def is_dead(self) -> bool:
        """Whether every request fails until the process is restarted."""
        return self._dead_reason is not None

    @property
    def dead_reason(self) -> str | None:
        """Why, in one line, ``None`` while alive."""
        return self._dead_reason

    @property
    def has_failed_requests(self) -> bool:
        """Whether a request was ended, or refused, because the engine is dead."""
        return self._has_failed_requests

    async def wait_dead(self) -> None:
        """Return when the engine is dead; it may never be."""
        await self._died.wait()

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
            find_forced = self._masks.add(live.request, live.matcher)
            self._scheduler.guide(live.request, find_forced)

    def _end(self, live: Live) -> None:
        """Each of a request's ends comes through here, once."""
        del self._live[live.request.request_id]
        self._masks.drop(live.request.request_id)
        self._num_preemptions += live.request.num_preemptions
        live.stream.timings.finished = self._clock()
        if isinstance(live, BeamGroup):
            self._num_beam_groups -= 1
            live.leave(self._live)

    def _finish(
        self,
        live: Live,
        reason: FinishReason,
        *,
        num_output_tokens: int | None = None,
        stop_reason: int | str | None = None,
    ) -> bool:
        """Tell the scheduler that a request ends for a reason that it cannot know itself.

        ``False``: it could not, which was the end of the engine and of every stream.
        """
        try:
            for request in live.requests:
                self._scheduler.finish(
                    request, reason, num_output_tokens=num_output_tokens, stop_reason=stop_reason
                )
        except Exception as error:
            self._die("the scheduler failed to finish a request", error)
            return False
        return True

    def _die(self, reason: str, cause: BaseException | None) -> None:
        """End every stream: the engine cannot go on."""
        if self._dead_reason is not None:
            return
        if cause is not None:
            reason = f"{reason}: {name_of(cause)}"
        self._dead_reason = reason
        logger.critical("the engine is dead: %s", reason, exc_info=cause)
        for live in dict.fromkeys(self._live.values()):
            self._end(live)
            live.fail(self._dead_error())
            self._has_failed_requests = True
        self._died.set()
        self._wake.set()

    def _dead_error(self) -> EngineDeadError:
        return EngineDeadError(f"the engine is dead: {self._dead_reason}")

    def _raise_if_dead(self) -> None:
        """Raise ``EngineDeadError`` if it is."""
        if self._dead_reason is not None:
            self._has_failed_requests = True
            raise self._dead_error()
