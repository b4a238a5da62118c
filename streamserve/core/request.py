"""A request as the scheduler sees it: token ids and two counters."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Mapping, Sequence
from enum import Enum, StrEnum, auto

from streamserve.core.block_pool import PrefixNode
from streamserve.core.forced import ForcedTokens
from streamserve.core.ngram import NgramIndex
from streamserve.core.plan import ModelRunnerOutput, TokenLogprobs
from streamserve.core.sampling_params import SamplingParams
from streamserve.core.shares import Account
from streamserve.core.time_limits import TimeLimits

NEVER = sys.maxsize
"""A step that there will not be."""


class RequestStatus(Enum):
    """Where a request stands. ``PREEMPTED`` requests wait again, their blocks given back."""

    WAITING = auto()
    RUNNING = auto()
    PREEMPTED = auto()
    FINISHED = auto()


class FinishReason(StrEnum):
    """Why a request ended. ``STOP`` and ``LENGTH`` are OpenAI's; the others end without success."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class Request:
    """One sequence being generated. Mutated by the scheduler and the KV cache manager only.

    There is no prefill and no decode phase: every step lets ``num_computed_tokens`` chase
    ``num_tokens + num_pending_tokens``::

        |<---------- token_ids (known to the host) --------->|<- pending ->|
        |<-- prompt -->|<-------------- output ------------->|             |
        |<------- num_computed_tokens (KV written or being written) --->|

    ``num_computed_tokens`` moves when a step is *scheduled*; ``num_pending_tokens`` counts tokens
    that a launched step samples and the host does not know yet. ``num_draft_tokens`` are guesses
    that such a step computes behind the known tokens; when it retires, ``num_computed_tokens`` goes
    back behind those that were right.

    Invariant: ``0 <= num_computed_tokens <= num_tokens + num_pending_tokens + num_draft_tokens``.
    """

    __slots__ = (
        "account",
        "adapter",
        "arrival_time",
        "awaited_hash",
        "block_hashes",
        "block_table",
        "cache_salt",
        "choice_index",
        "chooses_on_host",
        "computing_hash",
        "draft_rate",
        "drafts",
        "embedding",
        "ending_ids",
        "eos_token_ids",
        "failed_step_id",
        "finish_reason",
        "forced",
        "fork_source",
        "is_in_runner",
        "is_paused",
        "last_step_id",
        "matched_nodes",
        "max_num_tokens",
        "may_draft",
        "ngram_index",
        "num_cached_tokens",
        "num_charged_outputs",
        "num_charged_tokens",
        "num_computed_tokens",
        "num_draft_tokens",
        "num_free_when_refused",
        "num_pending_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "num_public_blocks",
        "num_queued_tokens",
        "num_steps_in_flight",
        "num_uncached_tokens",
        "num_written_tokens",
        "priority",
        "prompt_logprobs",
        "request_id",
        "sampling_params",
        "seed",
        "shares_public_prefixes",
        "sort_key",
        "state_slot",
        "status",
        "stop_reason",
        "tenant",
        "time_limits",
        "token_ids",
        "weight",
    )

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling_params: SamplingParams,
        *,
        arrival_time: float,
        seed: int,
        eos_token_ids: frozenset[int] = frozenset(),
        choice_index: int = 0,
        priority: int = 0,
        cache_salt: str = "",
        shares_public_prefixes: bool = False,
        tenant: str = "",
        weight: float = 1.0,
        time_limits: TimeLimits | None = None,
        adapter: int | None = None,
    ) -> None:
        self.request_id = request_id
        self.sampling_params = sampling_params
        self.arrival_time = arrival_time
        self.seed = seed
        self.eos_token_ids = eos_token_ids
        self.choice_index = choice_index
        self.priority = priority  # smaller is served first, as in vLLM
        self.cache_salt = cache_salt
        self.shares_public_prefixes = shares_public_prefixes  # though it has a salt
        self.tenant = tenant  # whose share of the machine it takes, where shares are kept
        self.weight = weight
        self.time_limits = time_limits
        self.adapter = adapter  # the slot in which the runner has it; its salt is the adapter's

        self.token_ids: list[int] = list(prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.num_computed_tokens = 0
        self.num_pending_tokens = 0
        self.num_draft_tokens = 0
        # Of the prompt's tokens from the second on, as far as they came; ``None``: not asked for.
        self.prompt_logprobs: list[TokenLogprobs] | None = (
            None if sampling_params.prompt_logprobs is None else []
        )
        self.embedding: array[float] | None = None  # what ends a request with ``pooling``
        self.num_cached_tokens = 0  # of the prompt, at first admission: what usage reports
        self.block_table: list[int] = []
        self.status = RequestStatus.WAITING
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None  # the stop id or string that matched
        self.num_preemptions = 0
        self.last_step_id = -1  # the newest step launched with this request in it

        # The rest is the scheduler's and the cache's own book-keeping.
        eos = frozenset() if sampling_params.ignore_eos else eos_token_ids
        self.ending_ids = eos.union(sampling_params.stop_token_ids)
        self.sort_key: tuple[float, ...] = ()
        self.num_uncached_tokens = self.num_prompt_tokens  # to compute, as seen at arrival
        self.max_num_tokens = 0  # token ids at which the answer ends with LENGTH
        self.num_steps_in_flight = 0
        self.num_written_tokens = 0  # leading tokens whose KV was there when a step retired
        self.failed_step_id = NEVER  # what it and later ones computed counts for nothing
        self.is_paused = False  # it has no seat, or loses it now, and asks for none
        self.state_slot: int | None = None  # while it has a seat, of a model that keeps states
        self.is_in_runner = False  # a NewRequest was sent, and its release was not
        self.block_hashes: list[bytes] = []  # of the leading full blocks of token_ids
        self.matched_nodes: list[PrefixNode] = []  # while it waits: of its leading cached blocks
        self.computing_hash: bytes | None = None  # the block it computes for others that wait
        self.awaited_hash: bytes | None = None  # the block it waits for while another computes it
        # What may complete a bad word of several tokens is known for one position only.
        self.may_draft = not sampling_params.bad_word_ids and not sampling_params.ends_with_prompt
        self.forced: ForcedTokens | None = None  # while it lives, if some may be
        self.ngram_index: NgramIndex | None = None  # of its own text, if it speculates
        self.drafts: list[int] = []  # what a draft model guesses behind the last token
        self.draft_rate = -1.0  # how many of its guesses were right lately; negative: not known
        self.fork_source: Request | None = None  # computes the prompt that this one then shares
        # Its next token is not what a step samples: somebody chooses it who sees the logprobs. It
        # counts as pending until then.
        self.chooses_on_host = False
        self.num_public_blocks = 0  # leading ones, cached for all who may share them
        self.account: Account | None = None  # the tenant's, where shares are kept
        self.num_queued_tokens = 0  # what it counts for in the queue's bound, while it waits
        self.num_charged_tokens = 0  # of the prompt, to the account; and of the output
        self.num_charged_outputs = 0
        self.num_free_when_refused = -1  # spare blocks when there was last no room to admit it

    def sibling(self, request_id: str, choice_index: int = 0) -> Request:
        """A new request for another answer to the same prompt, without limits of time."""
        other = Request(
            request_id,
            self.token_ids[: self.num_prompt_tokens],
            self.sampling_params,
            arrival_time=self.arrival_time,
            seed=self.seed,
            eos_token_ids=self.eos_token_ids,
            choice_index=choice_index,
            priority=self.priority,
            cache_salt=self.cache_salt,
            shares_public_prefixes=self.shares_public_prefixes,
            tenant=self.tenant,
            weight=self.weight,
            adapter=self.adapter,
        )
        other.prompt_logprobs = self.prompt_logprobs  # one list: they are found once
        return other

    @property
    def num_tokens(self) -> int:
        """Tokens known to the host, prompt and output."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Output tokens known to the host."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        """A copy of the output tokens known to the host."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def needs_prompt_rows(self) -> bool:
        """Whether its prompt must be computed, though it may be cached."""
        pooling, known = self.sampling_params.pooling, self.prompt_logprobs
        if pooling is not None:
            return pooling.needs_every_row
        return known is not None and len(known) < self.num_prompt_tokens - 1

    @property
    def is_finished(self) -> bool:
        """Whether ``Scheduler.finish`` has been called."""
        return self.status is RequestStatus.FINISHED

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id!r}, {self.status.name}, "
            f"computed {self.num_computed_tokens}/{self.num_tokens}+{self.num_pending_tokens})"
        )


def take_found(requests: Mapping[str, Request], output: ModelRunnerOutput) -> None:
    """Book what a step found of prompts, for those of ``requests`` that it concerns.

    Logprobs that are known stay as they are.
    """
    for request_id, (position, entries) in (output.prompt_logprobs or {}).items():
        request = requests.get(request_id)
        if request is None or output.step_id > request.failed_step_id:
            continue
        if request.prompt_logprobs is not None:
            num_known = len(request.prompt_logprobs) + 1  # the first token has none
            request.prompt_logprobs += entries[num_known - position :]
    for request_id, vector in (output.pooled or {}).items():
        request = requests.get(request_id)
        if request is not None and output.step_id <= request.failed_step_id:
            request.embedding = vector
