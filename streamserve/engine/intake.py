"""From what was asked for to requests with streams: what is checked before anything is queued."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Required, TypedDict, Unpack

from streamserve.core.clock import Clock
from streamserve.core.request import Request
from streamserve.core.sampling_params import BeamSearchParams, SamplingParams
from streamserve.core.time_limits import TimeLimits
from streamserve.engine.admission import AdmissionLimits
from streamserve.engine.bad_words import spell_bad_words
from streamserve.engine.grammar import Grammars
from streamserve.engine.live import BeamGroup, Live, beam_params
from streamserve.engine.output_processor import OutputProcessor
from streamserve.engine.stream import RequestStream
from streamserve.engine.tokenizer import Tokenizer
from streamserve.errors import InvalidParameterError


class Origin(TypedDict, total=False):
    """Who asks: ``arrival_time`` is now and ``priority`` is 0 unless given; see ``Request``.

    ``tenant`` and ``weight``: whose share of the machine it is, where shares are kept.
    ``adapter``: its slot; the salt begins with its own.
    ``is_tokenized``: the prompt's ids come from the engine's own tokenizer.
    """

    request_id: Required[str]
    priority: int
    cache_salt: str
    shares_public_prefixes: bool
    tenant: str
    weight: float
    time_limits: TimeLimits | None
    arrival_time: float | None
    is_tokenized: bool
    adapter: int | None


class Intake:
    """Makes requests. Raises ``InvalidParameterError`` or ``ContextLengthError``, and queues none.

    ``on_close`` is called with a request's id when its reader leaves, ``on_full`` as
    ``RequestStream`` says. Requests without a seed draw
    theirs from ``seed``, in their order.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        limits: AdmissionLimits,
        eos_token_ids: frozenset[int],
        grammars: Grammars,
        clock: Clock,
        on_close: Callable[[str], object],
        on_full: Callable[[str, bool], object],
        seed: int | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._limits = limits
        self._eos_token_ids = eos_token_ids
        self._grammars = grammars
        self._clock = clock
        self._on_close = on_close
        self._on_full = on_full
        self._seeds = random.Random(seed)

    def one(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        choice_index: int,
        **origin: Unpack[Origin],
    ) -> Live:
        """An ordinary request."""
        params = self.checked(prompt_token_ids, params, origin.get("is_tokenized", False))
        seed = self._seeds.getrandbits(63) if params.seed is None else params.seed
        return self._live(self._request(prompt_token_ids, params, seed, choice_index, **origin))

    def others(self, first: Live, n: int) -> list[Live]:
        """As many more requests with its prompt as make ``n`` choices, each with its own index."""
        source = first.request
        found: list[Live] = []
        for choice_index in range(1, n):
            request = source.sibling(f"{source.request_id}/{choice_index}", choice_index)
            request.time_limits = source.time_limits
            found.append(self._live(request))
        return found

    def beams(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        beams: BeamSearchParams,
        n: int,
        **origin: Unpack[Origin],
    ) -> BeamGroup:
        """A beam search for ``n`` answers."""
        params = self.checked(prompt_token_ids, params, origin.get("is_tokenized", False))
        self.check_beams(params, beams, n)
        asked = beam_params(params, beams, self._ending_ids(params))
        request = self._request(prompt_token_ids, asked, 0, 0, **origin)
        streams = [self._stream(request) for _ in range(n)]
        return BeamGroup(self._tokenizer, request, streams, params, beams)

    def check_beams(self, params: SamplingParams, beams: BeamSearchParams, n: int) -> None:
        """Raise what ``beams`` would for what is particular to it."""
        if params.max_tokens == 0:
            raise InvalidParameterError(
                "max_tokens must be at least 1 with use_beam_search: true, got 0",
                param="max_tokens",
            )
        if params.structured_output is not None:
            name = params.structured_output.param
            raise InvalidParameterError(
                f"{name} may not be given with use_beam_search: true", param=name
            )
        if params.thinking is not None and params.thinking.budget is not None:
            name = "thinking_token_budget"
            raise InvalidParameterError(
                f"{name} may not be given with use_beam_search: true", param=name
            )
        self._limits.check_beams(beams, n, len(self._ending_ids(params)))

    def _ending_ids(self, params: SamplingParams) -> frozenset[int]:
        ending_ids = frozenset() if params.ignore_eos else self._eos_token_ids
        return ending_ids.union(params.stop_token_ids)

    def checked(
        self, prompt_token_ids: list[int], params: SamplingParams, is_tokenized: bool
    ) -> SamplingParams:
        """``params`` with everything settled."""
        params = self._limits.check(prompt_token_ids, params, is_tokenized=is_tokenized)
        if params.bad_words and not params.bad_word_ids:
            words = spell_bad_words(self._tokenizer, params.bad_words)
            params = replace(params, bad_word_ids=words)
        return params

    def _request(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        seed: int,
        choice_index: int,
        **origin: Unpack[Origin],
    ) -> Request:
        arrival_time = origin.get("arrival_time")
        return Request(
            origin["request_id"],
            prompt_token_ids,
            params,
            arrival_time=self._clock() if arrival_time is None else arrival_time,
            seed=seed,
            eos_token_ids=self._eos_token_ids,
            choice_index=choice_index,
            priority=origin.get("priority", 0),
            cache_salt=origin.get("cache_salt", ""),
            shares_public_prefixes=origin.get("shares_public_prefixes", False),
            tenant=origin.get("tenant", ""),
            weight=origin.get("weight", 1.0),
            time_limits=origin.get("time_limits"),
            adapter=origin.get("adapter"),
        )

    def _live(self, request: Request) -> Live:
        grammar = request.sampling_params.structured_output
        matcher = None if grammar is None else self._grammars.matcher(grammar)
        processor = OutputProcessor(self._tokenizer, request)
        return Live(request, self._stream(request), processor, matcher)

    def _stream(self, request: Request) -> RequestStream:
        return RequestStream(
            request.request_id,
            request.num_prompt_tokens,
            arrival_time=request.arrival_time,
            on_close=self._on_close,
            on_full=self._on_full,
        )
