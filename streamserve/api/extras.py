"""What an answer shows besides its text, and the prompt that it is an answer to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streamserve.api.fields import (
    Reader,
    integer,
    one_of,
    out_of_range,
    read_bool,
    schema_of,
    typed,
)
from streamserve.api.logprobs import CompletionLogprobs, TokenNames
from streamserve.core.sampling_params import MAX_LOGPROBS, SamplingParams
from streamserve.engine.tokenizer import Tokenizer
from streamserve.errors import InvalidParameterError

_size = integer(-1)


@typed({**schema_of(_size), "not": {"const": 0}})
def _read_truncation(name: str, value: Any) -> int:
    size = _size(name, value)
    if size == 0:
        raise out_of_range(name, "at least 1, or -1 for what the model takes", size)
    return size


EXTRA_FIELDS: dict[str, Reader] = {
    "prompt_logprobs": integer(0, MAX_LOGPROBS),
    "return_token_ids": read_bool,
    "return_tokens_as_token_ids": read_bool,
    "truncate_prompt_tokens": _read_truncation,
    "truncation_side": one_of("left", "right"),
}


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt, and its text where the answer repeats it.

    ``is_tokenized`` says that the ids are our tokenizer's, and not the client's.
    """

    token_ids: list[int]
    echo: str = ""
    is_tokenized: bool = True


@dataclass(frozen=True, slots=True)
class Truncation:
    """How much of a prompt is kept: its last tokens, or the first ones."""

    num_tokens: int | None = None  # None: all; -1: as many as leave room for the answer
    keeps_first: bool = False

    def cut(self, token_ids: list[int], max_model_len: int, num_answer_tokens: int) -> list[int]:
        """The tokens that are kept. Raises ``InvalidParameterError`` past the model's length."""
        size = self.num_tokens
        if size is None:
            return token_ids
        if size > max_model_len:
            raise InvalidParameterError(
                f"truncate_prompt_tokens must be at most {max_model_len}, got {size}",
                param="truncate_prompt_tokens",
            )
        if size < 0:
            size = max(max_model_len - num_answer_tokens, 1)
        return token_ids[:size] if self.keeps_first else token_ids[-size:]


@dataclass(frozen=True, slots=True)
class Extras:
    """``names`` is set where logprobs were asked for, ``params`` then say of what text.

    ``tokenizer`` is set where vLLM's ``prompt_logprobs`` were.
    """

    names: TokenNames | None = None
    params: SamplingParams | None = None
    token_ids: bool = False
    tokenizer: Tokenizer | None = None

    @property
    def are_none(self) -> bool:
        """Whether the text is all."""
        return self.names is None and not self.token_ids

    def completion_logprobs(self, prompt: Prompt) -> CompletionLogprobs | None:
        """What renders a completion choice's logprobs, if they were asked for."""
        if self.names is None or self.params is None:
            return None
        return CompletionLogprobs(self.names, self.params, prompt.token_ids)


NO_EXTRAS = Extras()


@dataclass(frozen=True, slots=True)
class ExtraFields:
    """The fields as given."""

    token_ids: bool
    as_token_ids: bool
    prompt_logprobs: int | None
    truncation: Truncation

    def extras(self, params: SamplingParams, tokenizer: Tokenizer) -> Extras:
        """What the answer shows."""
        wants_names = params.logprobs is not None
        return Extras(
            names=TokenNames(tokenizer, self.as_token_ids) if wants_names else None,
            params=params if wants_names else None,
            token_ids=self.token_ids,
            tokenizer=None if self.prompt_logprobs is None else tokenizer,
        )


def read_extras(values: Mapping[str, Any]) -> ExtraFields:
    """Build from fields that were read through a table.

    Raises ``InvalidParameterError`` for a combination that cannot be.
    """
    if "prompt_logprobs" in values and values.get("stream", False):
        raise InvalidParameterError(
            "prompt_logprobs may be given only without stream: true",
            param="prompt_logprobs",
            code="invalid_value",
        )
    if "truncation_side" in values and "truncate_prompt_tokens" not in values:
        raise InvalidParameterError(
            "truncation_side may be given only with truncate_prompt_tokens",
            param="truncation_side",
            code="invalid_value",
        )
    return ExtraFields(
        token_ids=values.get("return_token_ids", False),
        as_token_ids=values.get("return_tokens_as_token_ids", False),
        prompt_logprobs=values.get("prompt_logprobs"),
        truncation=Truncation(
            values.get("truncate_prompt_tokens"), values.get("truncation_side") == "right"
        ),
    )
