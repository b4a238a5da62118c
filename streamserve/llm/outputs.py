"""What `LLM` and `AsyncLLM` return: the engine's outputs in vLLM's shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from streamserve.core.plan import TokenLogprobs
from streamserve.engine.stream import RequestTimings
from streamserve.engine.tokenizer import Tokenizer
from streamserve.errors import EngineError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's natural logarithm; ``rank`` from 1, ``None`` where nobody counted so far."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """When things happened, in seconds of a monotonic clock; ``None``: it did not."""

    arrival_time: float
    first_scheduled_time: float | None
    first_token_time: float | None
    last_token_time: float | None
    finished_time: float | None

    @classmethod
    def of(cls, timings: RequestTimings) -> RequestMetrics:
        return cls(
            timings.arrival,
            timings.first_scheduled,
            timings.first_token,
            timings.last_token,
            timings.finished,
        )

    @property
    def time_in_queue(self) -> float | None:
        """From the arrival to the first step with the request."""
        scheduled = self.first_scheduled_time
        return None if scheduled is None else scheduled - self.arrival_time


@dataclass(slots=True)
class CompletionOutput:
    """One answer. ``logprobs`` has for each token those that were asked for, by their ids.

    ``finish_reason`` is ``None`` while it grows; ``stop_reason`` is the stop string or id that
    ended it, ``None`` for the end of the sequence.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        """Whether the answer is complete."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """A prompt and its answers. ``prompt`` is ``None`` where only its token ids were given.

    ``prompt_logprobs`` has for each of its tokens those that were asked for, and ``None`` for the
    first, which follows nothing.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    metrics: RequestMetrics | None = None
    num_cached_tokens: int | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None


@dataclass(frozen=True, slots=True)
class EmbeddingOutput:
    """A prompt's vector."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """How many numbers it has."""
        return len(self.embedding)


@dataclass(frozen=True, slots=True)
class EmbeddingRequestOutput:
    """A prompt and its vector, as `LLM.embed` returns them."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    num_cached_tokens: int = 0
    finished: bool = True


@dataclass(frozen=True, slots=True)
class PoolingOutput:
    """A prompt's vector as a tensor ``[D]`` float32 on the host."""

    data: Tensor


@dataclass(frozen=True, slots=True)
class PoolingRequestOutput:
    """A prompt and its vector, as `LLM.encode` returns them."""

    request_id: str
    outputs: PoolingOutput
    prompt_token_ids: list[int]
    num_cached_tokens: int = 0
    finished: bool = True

    @classmethod
    def of(cls, output: EmbeddingRequestOutput) -> PoolingRequestOutput:
        """The same with a tensor."""
        import torch  # as late as the model is loaded: types of results need none

        data = torch.tensor(output.outputs.embedding)
        return cls(
            output.request_id,
            PoolingOutput(data),
            output.prompt_token_ids,
            output.num_cached_tokens,
        )


def cut_off() -> EngineError:
    """What is raised in place of an answer that did not come to its end."""
    return EngineError("the answer was cut off: the engine was closed")


def logprobs_by_id(
    entries: Sequence[TokenLogprobs], tokenizer: Tokenizer
) -> list[dict[int, Logprob]]:
    """For each position the sampled token's and the top ones', as vLLM lists them."""
    return [_position(entry, tokenizer) for entry in entries]


def _position(entry: TokenLogprobs, tokenizer: Tokenizer) -> dict[int, Logprob]:
    ranked = {
        token_id: Logprob(logprob, rank, tokenizer.token_text(token_id))
        for rank, (token_id, logprob) in enumerate(entry.top, start=1)
    }
    sampled = Logprob(entry.logprob, entry.rank or None, tokenizer.token_text(entry.token_id))
    return {entry.token_id: sampled, **ranked}
