"""What crosses between the scheduler and a model runner: plain, picklable data and one protocol."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeAlias

from streamserve.core.sampling_params import SamplingParams
from streamserve.errors import DeviceDeadError

PENDING_TOKEN = -1
"""In ``ScheduledRequest.token_ids``: the id that the previous step sampled, still on the device."""

Masks: TypeAlias = Mapping[str, bytes | Sequence[bytes | None]]
"""What grammars allow, by request id: packed bits, lowest first, 1 for a token that may come. One
mask for whatever a step samples of the request, or one for each of its samples, in their order.
Where there is none, all may.
"""


def mask_of(masks: Masks, request_id: str, index: int) -> bytes | None:
    """The mask of one of a request's samples in a step."""
    mask = masks.get(request_id)
    return mask if mask is None or isinstance(mask, bytes) else mask[index]


class BlockCopy(NamedTuple):
    """Copy-on-write: block ``src`` is copied to ``dst`` in every layer before the step's writes."""

    src: int
    dst: int


class BlockTransfer(NamedTuple):
    """A block of the device and one of host memory: which of them is copied, the list says."""

    block_id: int
    host_block_id: int


class StateCopy(NamedTuple):
    """Slot ``src`` is copied to ``dst`` in every layer that keeps a state, before the forward."""

    src: int
    dst: int


class StateSave(NamedTuple):
    """The state after ``position`` tokens of a request goes into ``slot`` as the step passes it.

    ``place`` is the request's in ``SchedulerOutput.scheduled``, whose share of the step has
    the token before ``position``.
    """

    place: int
    position: int
    slot: int


class StateMove(NamedTuple):
    """From this step on a request has its state in ``slot``: the one that was kept where its
    drafts stopped being right.
    """

    request_id: str
    slot: int


@dataclass(frozen=True, slots=True)
class NewRequest:
    """What a runner must know about a request that enters, or after preemption re-enters, a plan.

    The runner keeps it until the request's id appears in ``SchedulerOutput.released_ids``.
    ``token_ids`` are all the ids known to the host (prompt, then output): the penalties' history.
    """

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    sampling_params: SamplingParams
    seed: int
    choice_index: int
    eos_token_ids: frozenset[int] = frozenset()  # masked out until min_tokens
    adapter: int | None = None  # the slot of the one that its rows have
    state_slot: int | None = None  # where its state is, of a model that keeps some


class ScheduledRequest(NamedTuple):
    """One request's share of a step. A tuple: one is made per request and step.

    ``token_ids`` are computed at positions ``start, start + 1, …``. ``new_block_ids`` are appended
    to the request's block table, which starts empty with its ``NewRequest``.

    The last ``sample`` tokens' logits are sampled: none, one, or with drafts several. The first of
    these samples has output position ``output_position`` (0 is the first generated token), the next
    ones follow: it keys the random draw. The last ``sample - 1`` of ``token_ids`` are drafts, each
    a guess at the sample of the token before it; `num_kept` of the samples count. Of a request with
    ``pooling`` the row that would be sampled is its last: then its vector is due.
    """

    request_id: str
    start: int
    token_ids: list[int]
    new_block_ids: list[int]
    sample: int
    output_position: int

    def num_kept(self, samples: Sequence[int]) -> int:
        """How many of a step's ``samples`` count: up to the first that differs from its draft."""
        first_draft = len(self.token_ids) - self.sample + 1
        for i, draft in enumerate(self.token_ids[first_draft:]):
            if samples[i] != draft:
                return i + 1
        return self.sample


class PrefixGroup(NamedTuple):
    """Requests of a step whose block tables begin with the same full blocks.

    ``members`` are indices into ``SchedulerOutput.scheduled``, rising. What they share was
    computed before the step: ``num_blocks * block_size <= start`` for each of them.
    """

    members: tuple[int, ...]
    num_blocks: int


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """The plan of one step. Σ ``len(token_ids)`` ≤ ``max_num_batched_tokens``.

    A runner works in this order: drop ``released_ids``, add ``new_requests``, take over
    ``state_moves`` (of requests that it has), do every copy of a block or a state, then the
    forward. No block, and no slot of a state, is both source and destination of a copy in one plan.
    ``prefix_groups`` only say where attention may save work; no request is in two of them.

    ``stores`` copy blocks to host memory and ``loads`` copy them back, in every layer, at any time
    between the launch and the step's result: nothing that is in flight meanwhile writes what they
    read, or touches what they write. ``scheduled`` may be empty when there are loads.

    ``num_drafts``: how many tokens a draft model should guess behind what requests sample, by
    request id. They have room for them in their blocks, or are guessed as many as they have. Where
    all are 0 guesses do not pay, and the draft model need not keep up.
    """

    step_id: int
    new_requests: list[NewRequest] = field(default_factory=list)
    scheduled: list[ScheduledRequest] = field(default_factory=list)
    block_copies: list[BlockCopy] = field(default_factory=list)
    state_copies: list[StateCopy] = field(default_factory=list)
    state_saves: list[StateSave] = field(default_factory=list)
    state_moves: list[StateMove] = field(default_factory=list)
    released_ids: list[str] = field(default_factory=list)
    prefix_groups: list[PrefixGroup] = field(default_factory=list)
    stores: list[BlockTransfer] = field(default_factory=list)
    loads: list[BlockTransfer] = field(default_factory=list)
    num_drafts: dict[str, int] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Rows of the forward."""
        return sum(len(s.token_ids) for s in self.scheduled)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Logprobs of one token: natural logarithms of the model's own distribution.

    As in vLLM's and OpenAI's default they are taken before penalties, temperature and truncation.
    ``top`` is ``(token_id, logprob)`` by falling logprob, as many as ``SamplingParams.logprobs``.
    ``rank`` is 1 for the likeliest token, 0 where nobody counted: it is a prompt token's only.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    rank: int = 0


class PromptLogprobs(NamedTuple):
    """Logprobs of a prompt's tokens at ``position``, ``position + 1``, …"""

    position: int
    entries: list[TokenLogprobs]


@dataclass(frozen=True, slots=True)
class ModelRunnerOutput:
    """What one step sampled, in the order of ``SchedulerOutput.scheduled``.

    An entry of ``sampled_token_ids`` is empty where the plan did not ask for a sample; it holds
    several where drafts were right.
    ``logprobs`` is ``None`` when nobody asked; else an entry is empty for those who did not.
    ``prompt_logprobs`` go by request id, for those who asked and whose prompt was computed, and
    ``pooled`` has the vectors of those whose prompt is complete; these sample nothing.
    ``duration_s`` is how long the device worked on the step, waits for the host left out; ``None``
    from a runner that does not measure. ``drafts`` are what was guessed for the plan's
    ``num_drafts``, by request id, and ``drafting_s`` how long all but the first guesses took.
    """

    step_id: int
    sampled_token_ids: list[list[int]]
    logprobs: list[list[TokenLogprobs]] | None = None
    duration_s: float | None = field(default=None, compare=False)
    prompt_logprobs: Mapping[str, PromptLogprobs] | None = None
    pooled: Mapping[str, array[float]] | None = None
    drafts: Mapping[str, list[int]] | None = None
    drafting_s: float | None = field(default=None, compare=False)


class ModelRunner(Protocol):
    """Runs plans on a device. Called from the event loop's thread only.

    ``launch`` queues the forward and never waits. ``sample`` supplies what was not known at launch
    (grammar bit masks by request id) and returns a future that resolves on another thread; it is
    called once for every launched step, in order. An exception raised by the device is the
    future's: ``OutOfMemoryError`` if a smaller step may succeed, ``DeviceDeadError`` if none can
    run any more. Otherwise the runner still accepts further plans, and has booked the requests of
    the one that failed; what a step behind it says of the same requests is not looked at.
    """

    @property
    def num_compilations(self) -> int:
        """Kernels that this process compiled so far; the same for ever once the runner is warm."""

    def launch(self, plan: SchedulerOutput) -> None:
        """Start the forward of ``plan``."""

    def sample(self, step_id: int, masks: Masks | None = None) -> Future[ModelRunnerOutput]:
        """Sample the oldest launched step, which must be ``step_id``, once its forward is done."""

    def on_death(self, hear: Callable[[DeviceDeadError], None]) -> None:
        """Have ``hear`` called with the cause, once, when no step can run any more.

        That may be on any thread, with or without a step in flight, and at once if it is so
        already. From then on ``launch`` or the future of ``sample`` has a ``DeviceDeadError``.
        """

    def close(self) -> None:
        """Wait for what is in flight and free the device. Idempotent."""
