"""``SamplingParams`` as vLLM's users write them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from streamserve.api.choices import CHOICE_FIELDS, Choices, read_choices
from streamserve.api.extras import EXTRA_FIELDS
from streamserve.api.fields import Reader, integer
from streamserve.api.sampling import SAMPLING_FIELDS
from streamserve.core.sampling_params import MAX_LOGPROBS
from streamserve.core.sampling_params import SamplingParams as CoreSamplingParams
from streamserve.core.structured_output import StructuredOutput
from streamserve.core.thinking import Thinking, ThoughtText
from streamserve.errors import InvalidParameterError
from streamserve.llm.structured_outputs import StructuredOutputsParams

# A vector in an answer's place is asked for by calling `embed`.
_HONOURED = frozenset(field.name for field in fields(CoreSamplingParams)) - {"pooling"}

# What the server reads of a request is read here alike; the rest is the engine's own.
_READERS: dict[str, Reader] = {
    **SAMPLING_FIELDS,
    "logprobs": integer(0, MAX_LOGPROBS),
    "max_tokens": integer(0),
    "prompt_logprobs": EXTRA_FIELDS["prompt_logprobs"],
}

# Of fields that follow from others: `dataclasses.replace` gives them, nobody else.
_DERIVED = {
    "bad_word_ids": tuple,
    "structured_output": StructuredOutput,
    "thinking": Thinking,
    "thought_text": ThoughtText,
}

_BEAM_FIELDS = {"use_beam_search": False, "length_penalty": 1.0, "early_stopping": False}

# vLLM's fields, and of each the values that ask for nothing: ``None`` always is one.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "detokenize": (True,),
    "extra_args": ({},),
    "flat_logprobs": (False,),
    "guided_decoding": (),
    "logits_processors": ([],),
    "logprob_token_ids": ([],),
    "output_kind": (),
    "output_text_buffer_length": (0,),
    "pooling": (),
    "prompt_logprob_start": (0,),
    "prompt_logprob_token_ids": (),
    "repetition_detection": (),
    "skip_clone": (True, False),
    "stream_interval": (1,),
    "thinking_token_budget": (-1,),
    "truncate_prompt_tokens": (),
    "watermarking": (False,),
}


@dataclass(frozen=True, slots=True, kw_only=True, init=False)
class SamplingParams(CoreSamplingParams):
    """How the next token is drawn and when the answer ends, by vLLM's names.

    Sequences may be lists, ``stop`` one string, and what is ``None`` is as if it were not given;
    only ``max_tokens=None`` has a meaning, the rest of the context. ``n`` answers are given to each
    prompt, the likeliest of ``best_of`` (``None``: as many as ``n``); with ``use_beam_search``
    they are those of a search that keeps ``best_of`` sequences. With ``structured_outputs`` they
    follow a grammar. What cannot be done is refused by
    name. Raises ``InvalidParameterError``, and ``TypeError`` for a name nobody knows.
    """

    n: int = 1
    best_of: int | None = None
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    structured_outputs: StructuredOutputsParams | None = None

    def __init__(self, *, n: int | None = None, best_of: int | None = None, **given: Any) -> None:
        n = 1 if n is None else _plain(n)
        _check_count("n", n, 1)
        if best_of is not None:
            best_of = _plain(best_of)
            _check_count("best_of", best_of, n)
        object.__setattr__(self, "n", n)
        object.__setattr__(self, "best_of", best_of)
        for name, default in _BEAM_FIELDS.items():
            value = given.pop(name, None)
            value = default if value is None else CHOICE_FIELDS[name](name, _plain(value))
            object.__setattr__(self, name, value)
        for name, kind in _DERIVED.items():
            if given.get(name) is not None and not isinstance(given[name], kind):
                raise _unexpected(name)
        structured = given.pop("structured_outputs", None)
        object.__setattr__(self, "structured_outputs", structured)
        # Of another's fields (`dataclasses.replace`) this one follows from that.
        given["structured_output"] = None if structured is None else _grammar(structured)
        CoreSamplingParams.__init__(self, **_core_fields(given))
        choices_of(self)  # or why they cannot be


def choices_of(params: CoreSamplingParams) -> Choices:
    """How many answers, and how they are found. Raises ``InvalidParameterError``."""
    if not isinstance(params, SamplingParams):
        return Choices()
    given = {name: getattr(params, name) for name in (*_HONOURED, *_BEAM_FIELDS)}
    given |= {"n": params.n, "best_of": params.best_of or params.n}
    return read_choices({name: value for name, value in given.items() if value is not None})


def _grammar(given: Any) -> StructuredOutput:
    if not isinstance(given, StructuredOutputsParams):
        raise InvalidParameterError(
            f"structured_outputs must be StructuredOutputsParams, got {type(given).__name__}",
            param="structured_outputs",
        )
    return given.grammar_asked_for()


def _check_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidParameterError(
            f"{name} must be an integer of at least {least}, got {value!r}", param=name
        )


def _core_fields(given: Mapping[str, Any]) -> dict[str, Any]:
    known: dict[str, Any] = {}
    for name, value in given.items():
        if name in _HONOURED:
            if value is not None:
                known[name] = _core_value(name, value)
            elif name == "max_tokens":
                known[name] = None
        elif name not in _NEUTRAL:
            raise _unexpected(name)
        elif value is not None and value not in _NEUTRAL[name]:
            raise InvalidParameterError(
                f"{name} is not supported yet, got {value!r}",
                param=name,
                code="unsupported_parameter",
            )
    return known


def _unexpected(name: str) -> TypeError:
    return TypeError(f"SamplingParams() got an unexpected keyword argument {name!r}")


def _core_value(name: str, value: Any) -> Any:
    read = _READERS.get(name)
    return value if read is None else read(name, _plain(value))


def _plain(value: Any) -> Any:
    """``value`` in the types that JSON has."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, str | bytes | int | float):
        return value
    if hasattr(value, "tolist"):  # an array, or a number, of numpy's or torch's
        return value.tolist()
    return [_plain(item) for item in value] if isinstance(value, Iterable) else value
