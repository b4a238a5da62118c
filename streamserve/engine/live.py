"""What the engine holds of what it serves: a request with its stream, or a whole beam search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from streamserve.core.plan import TokenLogprobs
from streamserve.core.request import FinishReason, Request
from streamserve.core.sampling_params import BeamSearchParams, SamplingParams
from streamserve.core.scheduler import RequestUpdate, Scheduler
from streamserve.engine.beam_search import BeamSearch, Hypothesis
from streamserve.engine.output_processor import OutputProcessor
from streamserve.engine.outputs import RequestOutput
from streamserve.engine.stream import RequestStream
from streamserve.engine.tokenizer import Tokenizer
from streamserve.errors import EngineError

if TYPE_CHECKING:
    from llguidance import LLMatcher


class Live:
    """A request that has not ended, its stream, and the way from ids to text."""

    __slots__ = ("matcher", "processor", "request", "stream")

    def __init__(
        self,
        request: Request,
        stream: RequestStream,
        processor: OutputProcessor,
        matcher: LLMatcher | None = None,
    ) -> None:
        """``matcher`` is where the answer begins in the grammar that it follows, if any."""
        self.matcher = matcher
        self.request = request
        self.stream = stream
        self.processor = processor

    @property
    def requests(self) -> Sequence[Request]:
        """All that the scheduler has of it."""
        return (self.request,)

    @property
    def streams(self) -> Sequence[RequestStream]:
        """All that its readers have of it."""
        return (self.stream,)

    def abort(self) -> None:
        """Put the last output of what ended between two steps."""
        self.stream.put(self.processor.abort())

    def fail(self, error: EngineError) -> None:
        """End every stream with ``error``."""
        for stream in self.streams:
            stream.fail(error, self.processor.usage)


class BeamGroup(Live):
    """A beam search that has not ended: a request for each running sequence, a stream per answer.

    A sequence that goes on in one way only keeps its request. One that goes on in several ways is
    forked: the others share its blocks, and copy the last one when they write. ``request`` is the
    first and stands for all: its prompt is theirs.
    """

    __slots__ = ("_answered", "_beams", "_num_made", "_params", "_search", "_streams", "_tokenizer")

    def __init__(
        self,
        tokenizer: Tokenizer,
        request: Request,
        streams: Sequence[RequestStream],
        params: SamplingParams,
        beams: BeamSearchParams,
    ) -> None:
        """``params`` are what was asked for; ``request`` has what ``beam_params`` made of them."""
        super().__init__(request, streams[0], OutputProcessor(tokenizer, request))
        request.chooses_on_host, request.may_draft = True, False
        self._tokenizer = tokenizer
        self._params = params
        self._streams = streams
        assert params.max_tokens is not None
        self._search = BeamSearch(
            beams,
            ending_ids=request.ending_ids,
            max_tokens=params.max_tokens,
            min_tokens=params.min_tokens,
            num_top=params.logprobs or 0,
        )
        self._beams = [request]  # as ``_search.running``
        self._answered: dict[str, TokenLogprobs] = {}  # by request id
        self._num_made = 0

    @property
    def requests(self) -> Sequence[Request]:
        return self._beams

    @property
    def streams(self) -> Sequence[RequestStream]:
        return self._streams

    def abort(self) -> None:
        for stream in self._streams:
            if not stream.has_ended:
                stream.put(self.processor.abort())

    def advance(self, update: RequestUpdate, scheduler: Scheduler, live: dict[str, Live]) -> bool:
        """Note what may follow one sequence; once that of all is known, let the search choose.

        Returns whether it is over. ``live`` then has the new requests instead of the old.
        """
        [self._answered[update.request.request_id]] = update.logprobs
        if len(self._answered) < len(self._beams):
            return False
        rows = [self._answered[beam.request_id] for beam in self._beams]
        self._answered.clear()
        self.leave(live)
        before = self._beams
        continuations = self._search.advance(rows)
        self._beams = []
        kept: dict[int, int] = {}  # chosen tokens of the requests that go on, by place
        for parent, token_id in continuations:
            if parent in kept:
                self._beams.append(self._fork(scheduler, before[parent], token_id))
            else:
                kept[parent] = token_id
                self._beams.append(before[parent])
        for place, request in enumerate(before):
            if place in kept:
                scheduler.choose(request, kept[place])
            else:
                scheduler.finish(request, FinishReason.STOP)
        live.update((request.request_id, self) for request in self._beams)
        return not continuations

    def leave(self, live: dict[str, Live]) -> None:
        """Take the requests out of ``live``, but for the id that the whole is found under."""
        for beam in self._beams:
            if beam is not self.request:
                live.pop(beam.request_id, None)

    def put_outputs(self, now: float) -> int:
        """Give each stream its answer, once the search is over. Returns how many tokens."""
        outputs = [self._output(h) for h in self._search.best(len(self._streams))]
        for stream, output in zip(self._streams, outputs, strict=True):
            stream.timings.first_token = stream.timings.last_token = now
            stream.put(output)
        return sum(len(output.token_ids) for output in outputs)

    def _fork(self, scheduler: Scheduler, parent: Request, token_id: int) -> Request:
        child = self.request.sibling(self._new_id(scheduler))
        child.token_ids = [*parent.token_ids, token_id]
        child.block_hashes = list(parent.block_hashes)
        child.chooses_on_host, child.may_draft = True, False
        scheduler.fork(parent, child)
        return child

    def _new_id(self, scheduler: Scheduler) -> str:
        """One that nobody has: a client may have chosen any."""
        while True:
            self._num_made += 1
            request_id = f"{self.request.request_id}/{self._num_made}"
            if not scheduler.is_taken(request_id):
                return request_id

    def _output(self, hypothesis: Hypothesis) -> RequestOutput:
        """A sequence as its reader receives it, by the way of every answer."""
        first = self.request
        request = Request(
            first.request_id,
            first.token_ids[: first.num_prompt_tokens],
            self._params,
            arrival_time=first.arrival_time,
            seed=0,
        )
        request.num_cached_tokens = first.num_cached_tokens
        request.prompt_logprobs = first.prompt_logprobs
        token_ids = hypothesis.token_ids
        reason, stop_reason = FinishReason.LENGTH, None
        if hypothesis.has_ended:
            reason = FinishReason.STOP
            if token_ids[-1] in self._params.stop_token_ids:
                stop_reason = token_ids[-1]
        entries = hypothesis.entries if self._params.logprobs is not None else []
        processor = OutputProcessor(self._tokenizer, request)
        return processor.process(token_ids, entries, reason, stop_reason)


def beam_params(
    params: SamplingParams, beams: BeamSearchParams, ending_ids: frozenset[int]
) -> SamplingParams:
    """What the requests of a beam search ask of the sampler: the likeliest tokens, no more."""
    num_candidates = BeamSearch.num_candidates(beams, ending_ids)
    return replace(
        params,
        temperature=0.0,
        min_tokens=0,
        logprobs=max(num_candidates, params.logprobs or 0),
    )


def advance_beams(
    updates: list[RequestUpdate], live: dict[str, Live], scheduler: Scheduler
) -> tuple[list[RequestUpdate], list[BeamGroup]]:
    """Book what a step found for beam searches, and let those choose that can.

    Returns the updates of ordinary requests, and the searches that are over.
    """
    others: list[RequestUpdate] = []
    over: list[BeamGroup] = []
    for update in updates:
        if not update.request.chooses_on_host:
            others.append(update)
            continue
        group = live.get(update.request.request_id)
        if isinstance(group, BeamGroup) and group.advance(update, scheduler, live):
            over.append(group)
    return others, over
