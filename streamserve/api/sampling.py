"""The sampling fields that chat and completions share, from JSON to ``SamplingParams``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streamserve.api.choices import CHOICE_FIELDS
from streamserve.api.extras import EXTRA_FIELDS
from streamserve.api.fields import (
    MAX_INT,
    MAX_INT64,
    FieldTable,
    Reader,
    Refused,
    integer,
    list_of,
    nested,
    number,
    out_of_range,
    positive,
    read_bool,
    read_object,
    read_str,
    reported,
    schema_of,
    string,
    typed,
    wrong_type,
)
from streamserve.api.structured import STRUCTURED_FIELDS, structured_output
from streamserve.core.sampling_params import (
    MAX_BAD_WORDS,
    MAX_STOP_CHARACTERS,
    MAX_STOP_STRINGS,
    SamplingParams,
)
from streamserve.core.time_limits import TimeLimits
from streamserve.errors import ConfigError, InvalidParameterError, RequestError

MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIAS = 4096
MAX_ALLOWED_TOKEN_IDS = 2**20
TIME_FIELDS = ("max_queue_ms", "ttft_ms", "deadline_ms")  # as ``TimeLimits``
MAX_MILLISECONDS = 86_400_000.0  # a day

GENERATION_CONFIG_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""What a model's ``generation_config.json`` may set as defaults, as in vLLM. ``do_sample`` has no
say: many checkpoints leave it out or wrong, and a request that wants greedy says temperature 0."""

token_id = integer(0, MAX_INT)
_bias = number(-100.0, 100.0)

# Accepted and without effect: they say something about the request, not about the answer.
ANNOTATIONS = frozenset(
    {
        "metadata",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "session_id",
        "store",
    }
)

_NOT_BUILT = "is not supported by this server yet"

_LENGTH_FIELDS = ("max_completion_tokens", "max_output_tokens")
"""What ``max_tokens`` is called besides."""

REFUSED: dict[str, Refused] = {
    "data_parallel_rank": Refused(),
    "detokenize": Refused((True,)),
    "ec_transfer_params": Refused(),
    "kv_transfer_params": Refused(),
    "logprob_token_ids": Refused((), _NOT_BUILT),
    "logits_processors": Refused(([],)),
    "prompt_embeds": Refused(),
    "repetition_detection": Refused(),
    "request_id": Refused((), "is not supported: send an X-Request-Id header"),
    "return_mm_kwargs": Refused((True,)),
    "return_token_offsets": Refused((False,), _NOT_BUILT),
    "routed_experts_prompt_start": Refused((0,)),
    "stream_interval": Refused((1,), _NOT_BUILT),
    "thinking_token_budget": Refused((-1,), _NOT_BUILT),
    "vllm_xargs": Refused(({},)),
    "watermarking": Refused((False,), _NOT_BUILT),
}


_STOP = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS}


@typed(
    {
        "anyOf": [
            _STOP,
            {
                "type": "array",
                "items": _STOP,
                "maxItems": MAX_STOP_STRINGS,
            },
        ]
    }
)
def _read_stop(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise wrong_type(name, "a string or an array of strings", value)
    stops: tuple[str, ...] = list_of(read_str, "strings", MAX_STOP_STRINGS)(name, value)
    return stops


@typed(
    {
        "type": "object",
        "maxProperties": MAX_LOGIT_BIAS,
        "propertyNames": {"pattern": "^[0-9]{1,10}$"},
        "additionalProperties": schema_of(_bias),
    }
)
def _read_logit_bias(name: str, value: Any) -> dict[int, float]:
    pairs = read_object(name, value)
    if len(pairs) > MAX_LOGIT_BIAS:
        raise out_of_range(name, f"an object of at most {MAX_LOGIT_BIAS} entries", value)
    biases: dict[int, float] = {}
    for key, bias in pairs.items():
        # int() is too kind: it takes "1_0", " 1" and other scripts' digits.
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise out_of_range(name, "keyed by token ids", key)
        biases[token_id(f"{name} key", int(key))] = _bias(f"{name}[{key}]", bias)
    return biases


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """What a streamed answer reports besides its text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_timing: bool = False
    include_progress: bool = False


_STREAM_OPTIONS: dict[str, Reader] = {
    "include_usage": read_bool,
    "continuous_usage_stats": read_bool,
    "include_timing": read_bool,
    "include_progress": read_bool,
}
_STREAM_OPTIONS_REFUSED = {"include_obfuscation": Refused((False,))}
STREAM_OPTIONS_TABLE = FieldTable(_STREAM_OPTIONS, _STREAM_OPTIONS_REFUSED)


@nested(STREAM_OPTIONS_TABLE.schema())
def _read_stream_options(name: str, value: Any, unknown: list[str]) -> StreamOptions:
    return StreamOptions(**STREAM_OPTIONS_TABLE.read_inner(name, value, unknown))


SAMPLING_FIELDS: dict[str, Reader] = {
    "allowed_token_ids": list_of(token_id, "token ids", MAX_ALLOWED_TOKEN_IDS),
    "bad_words": list_of(read_str, "strings", MAX_BAD_WORDS),
    "frequency_penalty": number(-2.0, 2.0),
    "ignore_eos": read_bool,
    "include_stop_str_in_output": read_bool,
    "logit_bias": _read_logit_bias,
    "min_p": number(0.0, 1.0),
    "min_tokens": integer(0),
    "presence_penalty": number(-2.0, 2.0),
    "repetition_penalty": number(0.01, 100.0),
    "seed": integer(-MAX_INT64 - 1, MAX_INT64),
    "skip_special_tokens": read_bool,
    "spaces_between_special_tokens": read_bool,
    "stop": _read_stop,
    "stop_token_ids": list_of(token_id, "token ids", MAX_STOP_TOKEN_IDS),
    "temperature": number(0.0, 2.0),
    "top_k": integer(),
    "top_p": positive(1.0),
}

COMMON_FIELDS: dict[str, Reader] = {
    **SAMPLING_FIELDS,
    **STRUCTURED_FIELDS,
    **EXTRA_FIELDS,
    **CHOICE_FIELDS,
    "cache_salt": string(1, 1024),
    "deadline_ms": positive(MAX_MILLISECONDS),
    "include_timing": read_bool,
    "max_queue_ms": positive(MAX_MILLISECONDS),
    "model": read_str,
    "priority": integer(),
    "stream": read_bool,
    "stream_options": _read_stream_options,
    "ttft_ms": positive(MAX_MILLISECONDS),
    "user": string(0, 1024),
}


@dataclass(frozen=True, slots=True)
class Common:
    """What every generation request says. ``model`` is ``None`` where none was named."""

    model: str | None
    stream: bool
    stream_options: StreamOptions
    include_timing: bool
    priority: int | None
    cache_salt: str
    user: str
    unknown_fields: tuple[str, ...]
    time_limits: TimeLimits | None = None
    length_field: str = "max_tokens"


def read_common(values: Mapping[str, Any], unknown: list[str]) -> Common:
    """Build ``Common`` from fields that were read through a table."""
    stream = values.get("stream", False)
    options: StreamOptions = values.get("stream_options", StreamOptions())
    if "stream_options" in values and not stream:
        raise InvalidParameterError(
            "stream_options may be given only with stream: true",
            param="stream_options",
            code="invalid_value",
        )
    return Common(
        model=values.get("model"),
        stream=stream,
        stream_options=options,
        include_timing=options.include_timing or values.get("include_timing", False),
        priority=values.get("priority"),
        cache_salt=values.get("cache_salt", ""),
        user=values.get("user", ""),
        time_limits=_time_limits(values),
        unknown_fields=reported(unknown),
        length_field=_length_field(values),
    )


def _length_field(values: Mapping[str, Any]) -> str:
    """The field in which a request says how long its answer may be."""
    return next((name for name in _LENGTH_FIELDS if name in values), "max_tokens")


def name_length(error: RequestError, field: str) -> None:
    """Let ``error`` call the longest answer what the request calls it."""
    if field != "max_tokens":
        error.message = error.message.replace("max_tokens", field)
        error.args = (error.message,)
        if error.param == "max_tokens":
            error.param = field


def _time_limits(values: Mapping[str, Any]) -> TimeLimits | None:
    """What a request asks of time, ``None`` if nothing."""
    given = [values.get(name) for name in TIME_FIELDS]
    if not any(given):
        return None
    return TimeLimits(*(None if ms is None else ms / 1e3 for ms in given))


def sampling_params(
    values: Mapping[str, Any],
    defaults: Mapping[str, Any],
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    """Build the params from the fields that were given, over the model's own defaults.

    A beam search draws nothing, so that these defaults have no say in it.
    """
    given = {name: values[name] for name in SAMPLING_FIELDS if name in values}
    if values.get("use_beam_search", False):
        defaults = {}
    grammar = structured_output(values)
    try:
        return SamplingParams(
            **{**defaults, **given},
            max_tokens=max_tokens,
            logprobs=logprobs,
            structured_output=grammar,
            prompt_logprobs=prompt_logprobs,
        )
    except InvalidParameterError as error:
        name_length(error, _length_field(values))
        raise


def sampling_defaults(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults that a model's ``generation_config`` sets; the rest are OpenAI's.

    Raises ``ConfigError`` at start-up rather than at every request if one is out of range.
    """
    defaults = {
        name: generation_config[name]
        for name in GENERATION_CONFIG_FIELDS
        if generation_config.get(name) is not None
    }
    try:
        SamplingParams(**defaults)
    except (InvalidParameterError, TypeError) as exc:
        raise ConfigError(f"generation_config: {exc}") from exc
    return defaults
