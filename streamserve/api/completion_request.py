"""The body of ``POST /v1/completions``, parsed at the edge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streamserve.api.choices import Choices, read_choices
from streamserve.api.extras import ExtraFields, read_extras
from streamserve.api.fields import (
    MAX_INT,
    FieldTable,
    Reader,
    Refused,
    TypedReader,
    integer,
    out_of_range,
    read_bool,
    read_str,
    require,
    schema_of,
    typed,
    wrong_type,
)
from streamserve.api.sampling import (
    ANNOTATIONS,
    COMMON_FIELDS,
    REFUSED,
    Common,
    read_common,
    sampling_params,
    token_id,
)
from streamserve.core.sampling_params import MAX_LOGPROBS, SamplingParams

MAX_PROMPTS = 256
DEFAULT_MAX_TOKENS = 16  # OpenAI's for this endpoint

GivenPrompt = str | list[int]
"""A prompt as a request has it: a text, or its token ids."""

_PROMPT_KINDS = "a string, an array of strings, token ids, or an array of arrays of token ids"


def read_token_ids(name: str, value: list[Any]) -> list[int]:
    """Check an array of token ids, however long. May return ``value`` itself."""
    if set(map(type, value)) == {int} and min(value) >= 0 and max(value) <= MAX_INT:
        return value  # a prompt may be a million ids: no Python per id
    return [token_id(f"{name}[{i}]", item) for i, item in enumerate(value)]


def prompts_reader(max_prompts: int, what: str) -> TypedReader[tuple[GivenPrompt, ...]]:
    """A reader of one prompt or up to ``max_prompts``, each text or token ids."""
    size = {"type": "array", "minItems": 1, "maxItems": max_prompts}

    @typed(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "minItems": 1, "items": schema_of(token_id)},
                {**size, "items": {"type": "string"}},
                {
                    **size,
                    "items": {"type": "array", "minItems": 1, "items": schema_of(token_id)},
                },
            ]
        }
    )
    def read(name: str, value: Any) -> tuple[GivenPrompt, ...]:
        return _read_prompts(name, value, max_prompts, what)

    return read


def _read_prompts(name: str, value: Any, max_prompts: int, what: str) -> tuple[GivenPrompt, ...]:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise wrong_type(name, _PROMPT_KINDS, value)
    if not value:
        raise out_of_range(name, "a non-empty array", value)
    first = value[0]
    if isinstance(first, (int, float)) and not isinstance(first, bool):
        return (read_token_ids(name, value),)
    if len(value) > max_prompts:
        raise out_of_range(name, f"at most {max_prompts} {what}", value)
    if isinstance(first, str):
        return tuple(read_str(f"{name}[{i}]", item) for i, item in enumerate(value))
    prompts: list[GivenPrompt] = []
    for i, item in enumerate(value):
        if not isinstance(item, list):
            raise wrong_type(f"{name}[{i}]", "a string or an array of token ids", item)
        if not item:
            raise out_of_range(f"{name}[{i}]", "a non-empty array of token ids", item)
        prompts.append(read_token_ids(f"{name}[{i}]", item))
    return tuple(prompts)


COMPLETION_FIELDS: dict[str, Reader] = {
    **COMMON_FIELDS,
    "add_special_tokens": read_bool,
    "echo": read_bool,
    "logprobs": integer(0, MAX_LOGPROBS),
    "max_tokens": integer(0),
    "prompt": prompts_reader(MAX_PROMPTS, "prompts"),
}

COMPLETION_REFUSED: dict[str, Refused] = {
    **REFUSED,
    "suffix": Refused(("",), "is not supported by this server yet"),
}


COMPLETION_TABLE = FieldTable(COMPLETION_FIELDS, COMPLETION_REFUSED, ANNOTATIONS, ("prompt",))


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """A completion request whose every field is valid; one choice for each prompt, in order."""

    common: Common
    prompts: tuple[GivenPrompt, ...]
    params: SamplingParams
    extras: ExtraFields
    choices: Choices
    add_special_tokens: bool
    echo: bool


def parse_completion_request(
    body: Mapping[str, Any], defaults: Mapping[str, Any]
) -> CompletionRequest:
    """Parse and check; ``defaults`` are the model's sampling defaults.

    Raises ``InvalidParameterError`` for the first field that is wrong or not supported.
    """
    values, unknown = COMPLETION_TABLE.read(body)
    echo = values.get("echo", False)
    logprobs = values.get("logprobs")
    prompt_logprobs = values.get("prompt_logprobs")
    if echo and prompt_logprobs is None:
        prompt_logprobs = logprobs
    return CompletionRequest(
        common=read_common(values, unknown),
        prompts=require(values, "prompt"),
        params=sampling_params(
            values,
            defaults,
            max_tokens=values.get("max_tokens", DEFAULT_MAX_TOKENS),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        ),
        extras=read_extras(values),
        choices=read_choices(values),
        add_special_tokens=values.get("add_special_tokens", True),
        echo=echo,
    )
