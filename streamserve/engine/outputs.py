"""What a request's reader receives."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from streamserve.core.plan import TokenLogprobs
from streamserve.core.request import FinishReason


@dataclass(slots=True)
class Usage:
    """Tokens so far. ``cached_tokens`` is the part of the prompt that the prefix cache held.

    ``reasoning_tokens`` is the part of the completion that was thought, where the API looks for it.
    """

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int | None = None


@dataclass(slots=True)
class RequestOutput:
    """News of one request since the last one; ``merge_outputs`` puts neighbours together.

    ``text`` is ready to show (never half a character, never a possible beginning of a stop
    string). ``token_ids`` and ``logprobs`` may run ahead of or behind the text by the tokens whose
    text is held back. ``finish_reason`` is set in the last output only; ``stop_reason`` is the stop
    string or id that matched, ``None`` for end-of-sequence (vLLM's meaning). The first output has
    the ``prompt_logprobs`` if they were asked for, from the second token of the prompt on. A
    request with ``pooling`` has one output, and no text: the prompt's ``embedding``.
    """

    text: str
    token_ids: list[int]
    usage: Usage
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_merged: int = 1
    prompt_logprobs: list[TokenLogprobs] | None = None
    embedding: array[float] | None = None


def merge_outputs(outputs: Sequence[RequestOutput]) -> RequestOutput:
    """What at least one output, and those that follow it, say together. Associative, linear."""
    last = outputs[-1]
    return RequestOutput(
        text="".join([output.text for output in outputs]),
        token_ids=[token_id for output in outputs for token_id in output.token_ids],
        usage=last.usage,
        logprobs=[entry for output in outputs for entry in output.logprobs],
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        num_merged=sum([output.num_merged for output in outputs]),
        prompt_logprobs=outputs[0].prompt_logprobs,
        embedding=last.embedding,
    )
