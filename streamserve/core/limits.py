"""What can ever fit: checked at the door, so that nothing accepted is left hanging."""

from __future__ import annotations

from streamserve.core.sampling_params import SamplingParams
from streamserve.errors import ContextLengthError


class ContextLimits:
    """The longest request: the model's limit, or what the whole KV cache holds for it alone."""

    def __init__(self, max_model_len: int, num_kv_tokens: int) -> None:
        self._max_model_len = max_model_len
        self._num_kv_tokens = num_kv_tokens
        # The last token is never an input, so it needs no KV.
        self.max_num_tokens = min(max_model_len, num_kv_tokens + 1)

    def num_tokens_at_end(self, num_prompt_tokens: int, params: SamplingParams) -> int:
        """Prompt and output tokens at which an answer ends with ``LENGTH``, if ``check`` passes."""
        if params.ends_with_prompt:
            return num_prompt_tokens + 1  # one that is never there
        if params.max_tokens is None:
            return self.max_num_tokens
        return num_prompt_tokens + params.max_tokens

    def check(self, num_prompt_tokens: int, params: SamplingParams) -> None:
        """Raise ``ContextLengthError`` unless the request, alone, could run to its full length."""
        if num_prompt_tokens < 1:
            raise ContextLengthError(
                f"the prompt must hold at least 1 token, got {num_prompt_tokens}"
            )
        if params.ends_with_prompt:
            self._check_prompt(num_prompt_tokens)
            return
        num_output_tokens = 1 if params.max_tokens is None else params.max_tokens
        num_tokens = num_prompt_tokens + num_output_tokens
        if num_tokens <= self.max_num_tokens:
            return
        answer = (
            "at least 1 more" if params.max_tokens is None else f"max_tokens {num_output_tokens}"
        )
        asked = f"got {num_tokens}: a prompt of {num_prompt_tokens} and {answer}"
        if num_tokens > self._max_model_len:
            raise ContextLengthError(
                f"prompt and answer must be at most max_model_len ({self._max_model_len})"
                f" tokens, {asked}"
            )
        fits_with_less = num_prompt_tokens < self.max_num_tokens
        raise ContextLengthError(
            f"prompt and answer must be at most {self.max_num_tokens} tokens, which is all that"
            f" the KV cache of {self._num_kv_tokens} tokens can serve, {asked}",
            param="max_tokens" if fits_with_less else "messages",
        )

    def _check_prompt(self, num_tokens: int) -> None:
        """As ``check`` for a prompt without an answer."""
        limit = min(self._max_model_len, self._num_kv_tokens)
        if not 1 <= num_tokens <= limit:
            what = "max_model_len" if limit == self._max_model_len else "what the KV cache holds"
            raise ContextLengthError(
                f"the input must be 1 to {limit} tokens ({what}), got {num_tokens}"
            )
