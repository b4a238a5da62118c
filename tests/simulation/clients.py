"""Who visits the simulated engine, how they read, and what they check of what they were given."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Set
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from streamserve.core.request import FinishReason
from streamserve.core.sampling_params import BeamSearchParams, SamplingParams
from streamserve.engine.async_engine import AsyncEngine
from streamserve.engine.stream import RequestStream
from streamserve.errors import EngineDeadError, EngineError, QueueFullError
from tests.simulation.expected import EOS, Answer, beam_answers, solo_answer, text_of

_SINK_ROOM = 3  # texts that a sink takes before it has no room for one
_TOKEN_BYTES = 40  # of an unread one, at least
_TOKENS_ON_THE_WAY = 12  # when a reader is full: two steps with drafts, and what lay there before


@dataclass(frozen=True)
class Reading:
    """How a client reads. Times are virtual seconds."""

    pause_s: float = 0.0  # before each output
    has_sink: bool = False
    leaves_after: int | None = None  # outputs
    is_aborted_at: float | None = None  # after its arrival, by somebody else
    max_unread_bytes: int | None = None


@dataclass
class Heard:
    """What came through one stream."""

    stream: RequestStream
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    num_sunk: int = 0  # texts, whose ids are not told
    num_ends: int = 0
    finish_reason: FinishReason | None = None
    num_tokens: int = 0  # as usage has it
    error: EngineError | None = None

    def sink(self, text: str) -> bool:
        assert text
        if self.num_sunk % (_SINK_ROOM + 1) == _SINK_ROOM:
            self.num_sunk += 1
            return False
        self.num_sunk += 1
        self.text += text
        return True


@dataclass
class Client:
    """One request and its readers. ``visit`` raises nothing that it can expect."""

    request_id: str
    arrival: float
    prompt: list[int]
    params: SamplingParams
    n: int
    beams: BeamSearchParams | None
    priority: int
    cache_salt: str
    reading: Reading
    max_model_len: int
    heard: list[Heard] = field(default_factory=list)
    has_come: bool = False
    has_left: bool = False
    was_aborted: bool = False
    refusal: Exception | None = None

    async def visit(self, engine: AsyncEngine, deserted: set[str]) -> None:
        """Come, ask, read to the end or leave. Cancelling it is how a connection breaks.

        Who leaves is in ``deserted`` from then on.
        """
        self.has_come = True
        try:
            await asyncio.sleep(self.arrival)
            try:
                streams = self._submit(engine)
            except (QueueFullError, EngineDeadError) as error:
                self.refusal = error
                return
            self.heard = [Heard(stream) for stream in streams]
            for stream in streams if self.beams is None else ():
                stream.max_unread_bytes = self.reading.max_unread_bytes
            if self.reading.is_aborted_at is not None:
                loop = asyncio.get_running_loop()
                loop.call_later(self.reading.is_aborted_at, self._abort, engine)
            async with AsyncExitStack() as stack:
                for stream in streams:
                    await stack.enter_async_context(stream)
                for heard in self.heard:
                    await self._read(heard)
        except asyncio.CancelledError:
            self.has_left = True
            raise
        finally:
            if self.has_left:
                deserted.add(self.request_id)

    def _submit(self, engine: AsyncEngine) -> list[RequestStream]:
        origin = {
            "request_id": self.request_id,
            "priority": self.priority,
            "cache_salt": self.cache_salt,
        }
        prompt, params = list(self.prompt), self.params
        if self.beams is not None:
            return engine.submit_beams(prompt, params, self.beams, self.n, **origin)
        if self.n > 1:
            return engine.submit_choices(prompt, params, self.n, **origin)
        return [engine.submit(prompt, params, **origin)]

    def _abort(self, engine: AsyncEngine) -> None:
        self.was_aborted = engine.abort(self.request_id) or self.was_aborted

    async def _read(self, heard: Heard) -> None:
        reading = self.reading
        if reading.has_sink and self.beams is None:
            heard.stream.sink = heard.sink
        num_read = 0
        try:
            while heard.finish_reason is None:
                if num_read == reading.leaves_after:
                    self.has_left = True
                    return
                if reading.pause_s:
                    await asyncio.sleep(reading.pause_s)
                output = await heard.stream.get()
                num_read += 1
                if reading.max_unread_bytes is not None and self.beams is None:
                    most = reading.max_unread_bytes // _TOKEN_BYTES + _TOKENS_ON_THE_WAY
                    assert len(output.token_ids) <= most, "more was kept than the bound"
                heard.token_ids += output.token_ids
                heard.text += output.text
                heard.num_tokens = output.usage.completion_tokens
                heard.finish_reason = output.finish_reason
        except EngineError as error:
            heard.error = error
        heard.num_ends += 1

    # What must be true in the end.

    def check(
        self,
        failed_alone: Set[str],
        is_dead: bool,
        culprits: Set[str],
        ends: Mapping[str, list[int]],
        has_drafts: bool,
    ) -> None:
        """Every stream has ended as it should have. ``ends``: what the scheduler had in the end."""
        beams = None
        if self.beams is not None:
            beams = beam_answers(self.prompt, self.params, self.beams, self.n)
        if self.refusal is not None:
            assert not self.heard
        for index, heard in enumerate(self.heard):
            assert heard.stream.has_ended or is_dead, f"{self.request_id}: the engine forgot it"
            assert heard.num_ends <= 1
            assert heard.num_ends or self.has_left, f"{self.request_id}: its reader still waits"
            if heard.error is not None:
                earned = self.request_id in failed_alone
                assert earned or (is_dead and isinstance(heard.error, EngineDeadError)), heard.error
            elif heard.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
                assert self.request_id not in culprits, "what no step can have has an answer"
                self._check_answer(heard, None if beams is None else beams[index])
                if beams is None:
                    request_id = f"{self.request_id}/{index}" if index else self.request_id
                    self._check_kept(ends[request_id], has_drafts)
            else:
                self._check_beginning(heard)

    def _check_answer(self, heard: Heard, beam: list[int] | None) -> None:
        if beam is not None:
            assert heard.token_ids == beam, f"{self.request_id}: another beam"
            return
        answer = self._alone()
        who = f"{self.request_id}: not what it is alone"
        if not heard.num_sunk:
            assert heard.token_ids == answer.token_ids, who
        assert heard.num_tokens == len(answer.token_ids), who
        assert heard.text == answer.text, who
        assert heard.finish_reason is answer.finish_reason, who

    def _check_kept(self, token_ids: list[int], has_drafts: bool) -> None:
        """Nothing is kept behind the end, unless a step of drafts brought its own end there."""
        kept = self.prompt + self._alone().token_ids
        assert token_ids[: len(kept)] == kept
        if len(token_ids) > len(kept):
            num_output = len(token_ids) - len(self.prompt)
            ended = num_output == self.params.max_tokens or token_ids[-1] in self._ending_ids()
            assert has_drafts, "tokens behind the end were kept"
            assert ended, "tokens behind the end were kept"

    def _ending_ids(self) -> Set[int]:
        return {*self.params.stop_token_ids} | (set() if self.params.ignore_eos else {EOS})

    def _alone(self) -> Answer:
        return solo_answer(self.prompt, self.params, self.max_model_len)

    def _check_beginning(self, heard: Heard) -> None:
        """Of an answer that was cut: it is the beginning of the whole one."""
        if self.beams is not None:
            assert not heard.token_ids
            return
        answer = self._alone()
        who = f"{self.request_id}: not the beginning of what it is alone"
        if not heard.num_sunk:
            assert heard.token_ids == answer.token_ids[: len(heard.token_ids)], who
        assert text_of(answer.token_ids).startswith(heard.text), who
