"""How many answers a request wants, and how the best of them are found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Unpack

from streamserve.api.fields import (
    Reader,
    integer,
    number,
    out_of_range,
    read_bool,
    typed,
    wrong_type,
)
from streamserve.core.sampling_params import BeamSearchParams, SamplingParams
from streamserve.engine.async_engine import AsyncEngine
from streamserve.engine.intake import Origin
from streamserve.engine.stream import RequestStream
from streamserve.errors import InvalidParameterError

MAX_CHOICES = 128  # for each prompt, as in OpenAI's API
MAX_REQUESTS = 256  # of one body: prompts times candidates

# What cannot be honoured where nothing is drawn, and the values that ask for nothing.
_ONLY_DRAWN: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (),
    "bad_words": ((),),
    "frequency_penalty": (0.0,),
    "logit_bias": ({},),
    "min_p": (0.0,),
    "presence_penalty": (0.0,),
    "repetition_penalty": (1.0,),
    "stop": ((),),
    "temperature": (0.0, 1.0),
    "top_k": (0, -1),
    "top_p": (1.0,),
}


@typed({"enum": [True, False, "never"]})
def _read_early_stopping(name: str, value: Any) -> bool | Literal["never"]:
    if isinstance(value, bool):
        return value
    if not isinstance(value, str):
        raise wrong_type(name, 'a boolean or "never"', value)
    if value != "never":
        raise out_of_range(name, 'true, false or "never"', value)
    return "never"


CHOICE_FIELDS: dict[str, Reader] = {
    "best_of": integer(1, MAX_CHOICES),
    "early_stopping": _read_early_stopping,
    "length_penalty": number(-10.0, 10.0),
    "n": integer(1, MAX_CHOICES),
    "use_beam_search": read_bool,
}


@dataclass(frozen=True, slots=True)
class Choices:
    """``n`` answers to each prompt, the best of ``num_candidates``, or of a beam search."""

    n: int = 1
    num_candidates: int = 1
    beams: BeamSearchParams | None = None

    @property
    def are_compared(self) -> bool:
        """Whether some candidates are dropped at the end."""
        return self.beams is None and self.num_candidates > self.n

    def _engine_params(self, params: SamplingParams) -> SamplingParams:
        """Candidates are compared by their logprobs."""
        if not self.are_compared or params.logprobs is not None:
            return params
        return replace(params, logprobs=0)

    def submit(
        self,
        engine: AsyncEngine,
        token_ids: list[int],
        params: SamplingParams,
        **origin: Unpack[Origin],
    ) -> list[RequestStream]:
        """Hand one prompt to the engine; a stream for each candidate. Raises as the engine."""
        if self.beams is not None:
            return engine.submit_beams(token_ids, params, self.beams, self.n, **origin)
        params = self._engine_params(params)
        if self.num_candidates > 1:
            return engine.submit_choices(token_ids, params, self.num_candidates, **origin)
        return [engine.submit(token_ids, params, **origin)]

    def check_size(self, num_prompts: int) -> None:
        """Raise ``InvalidParameterError`` for more requests than one body may bring."""
        size = num_prompts * self.num_candidates
        if self.num_candidates > 1 and size > MAX_REQUESTS:
            name = "best_of" if self.num_candidates > self.n else "n"
            raise InvalidParameterError(
                f"{name} times the number of prompts must be at most {MAX_REQUESTS}, got {size}",
                param=name,
            )


def read_choices(values: Mapping[str, Any]) -> Choices:
    """Build from fields that were read through a table.

    Raises ``InvalidParameterError`` for a combination that cannot be.
    """
    n: int = values.get("n", 1)
    best_of: int = values.get("best_of", n)
    streams = values.get("stream", False)
    if best_of < n:
        raise out_of_range("best_of", f"at least n ({n})", best_of)
    if values.get("use_beam_search", False):
        if streams:
            raise _only_without_stream("use_beam_search")
        return Choices(n, best_of, _read_beams(values, best_of))
    if best_of > n and streams:
        raise _only_without_stream("best_of", f"above n ({n}) ")
    for name, neutral in (("length_penalty", 1.0), ("early_stopping", False)):
        if values.get(name, neutral) != neutral:
            raise InvalidParameterError(
                f"{name} may be given only with use_beam_search: true",
                param=name,
                code="invalid_value",
            )
    return Choices(n, best_of)


def _read_beams(values: Mapping[str, Any], width: int) -> BeamSearchParams:
    for name, neutral in _ONLY_DRAWN.items():
        if name in values and values[name] not in neutral:
            raise InvalidParameterError(
                f"{name} may not be given with use_beam_search: true",
                param=name,
                code="invalid_value",
            )
    return BeamSearchParams(
        beam_width=width,
        length_penalty=values.get("length_penalty", 1.0),
        early_stopping=values.get("early_stopping", False),
    )


def _only_without_stream(name: str, how: str = "") -> InvalidParameterError:
    return InvalidParameterError(
        f"{name} {how}may be given only without stream: true", param=name, code="invalid_value"
    )
