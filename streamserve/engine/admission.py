"""What can be known of a request before it is queued."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from streamserve.core.sampling_params import MAX_LOGPROBS, BeamSearchParams, SamplingParams
from streamserve.errors import ContextLengthError, InvalidParameterError


def check_length(num_tokens: int, params: SamplingParams, max_model_len: int) -> None:
    """Raise ``ContextLengthError`` for a prompt that leaves its answer, if it has one, no room."""
    longest = max_model_len if params.ends_with_prompt else max_model_len - 1
    if num_tokens <= longest:
        return
    what = "input" if params.ends_with_prompt else "prompt"
    no_room = "" if params.ends_with_prompt else ", which leaves no room for an answer"
    raise ContextLengthError(
        f"This model's maximum context length is {max_model_len} tokens. However, your {what} has"
        f" {num_tokens} tokens{no_room}. Please reduce the length of the {what}."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionLimits:
    """The model's limits: positions and rows of the vocabulary.

    With ``keeps_states`` its layers remember a text in a form that beams cannot share.
    """

    max_model_len: int
    vocab_size: int
    num_tokenizer_ids: int
    keeps_states: bool = False

    def check(
        self, prompt_token_ids: list[int], params: SamplingParams, *, is_tokenized: bool
    ) -> SamplingParams:
        """Return ``params`` with ``max_tokens`` settled: at most what the context has left.

        A longest answer is no promise of that length, and clients say the same for every prompt;
        one that is longer than the whole context is refused, as in vLLM.

        Raises ``InvalidParameterError`` or ``ContextLengthError``.
        """
        if not prompt_token_ids:
            raise InvalidParameterError("prompt must hold at least one token", param="prompt")
        # A tokenizer may have more ids than the model; otherwise its own need no look at each.
        if not is_tokenized or self.num_tokenizer_ids > self.vocab_size:
            self._check_ids("prompt", prompt_token_ids)
        self._check_ids("stop_token_ids", params.stop_token_ids)
        self._check_ids("logit_bias", params.logit_bias)
        self._check_ids("allowed_token_ids", params.allowed_token_ids or ())
        num_prompt_tokens = len(prompt_token_ids)
        check_length(num_prompt_tokens, params, self.max_model_len)
        if params.ends_with_prompt:
            return params
        num_left = self.max_model_len - num_prompt_tokens
        longest = num_left if params.max_tokens is None else params.max_tokens
        if longest > self.max_model_len:
            raise ContextLengthError(self._message(num_prompt_tokens, longest), param="max_tokens")
        if params.min_tokens > num_left:
            raise ContextLengthError(
                self._message(num_prompt_tokens, params.min_tokens), param="min_tokens"
            )
        return replace(params, max_tokens=min(longest, num_left))

    def check_beams(self, beams: BeamSearchParams, n: int, num_ending_ids: int) -> None:
        """Raise ``InvalidParameterError`` unless the likeliest tokens suffice for so many beams."""
        if self.keeps_states:
            raise InvalidParameterError(
                "use_beam_search may not be true with this model (its layers keep a state of the"
                " text, which beams cannot share), got true",
                param="use_beam_search",
            )
        if beams.beam_width < n:
            raise InvalidParameterError(
                f"n must be at most the beam width of {beams.beam_width}, got {n}", param="n"
            )
        limit = min(MAX_LOGPROBS - num_ending_ids, self.vocab_size - num_ending_ids)
        if beams.beam_width > limit:
            raise InvalidParameterError(
                f"best_of must be at most {limit} with use_beam_search ({MAX_LOGPROBS} less the"
                f" tokens that end an answer), got {beams.beam_width}",
                param="best_of",
            )

    def _check_ids(self, name: str, token_ids: Iterable[int]) -> None:
        low, high = min(token_ids, default=0), max(token_ids, default=0)
        if low < 0 or high >= self.vocab_size:
            raise InvalidParameterError(
                f"{name} must hold token ids from 0 to {self.vocab_size - 1}, "
                f"got {low if low < 0 else high}",
                param=name,
            )

    def _message(self, num_prompt_tokens: int, num_output_tokens: int) -> str:
        return (
            f"This model's maximum context length is {self.max_model_len} tokens. However, you "
            f"requested {num_prompt_tokens + num_output_tokens} tokens ({num_prompt_tokens} in "
            f"the prompt, {num_output_tokens} in the completion). Please reduce the length of the "
            "prompt or the completion."
        )
