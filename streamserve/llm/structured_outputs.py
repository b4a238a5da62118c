"""``StructuredOutputsParams`` as vLLM's users write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from streamserve.api.structured import STRUCTURED_FIELDS
from streamserve.core.structured_output import StructuredOutput

_NAME = "structured_outputs"


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """What an answer must look like: one of the first six, the rest say how.

    ``json`` and ``structural_tag`` are objects, or text that holds one. Raises
    ``InvalidParameterError`` unless exactly one is given; whether a schema, regex or grammar can be
    compiled is known when it is used.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | Mapping[str, Any] | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    disable_fallback: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        self.grammar_asked_for()

    def grammar_asked_for(self) -> StructuredOutput:
        """As the engine takes it, read as the server reads the field of this name."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.choice is not None and not isinstance(self.choice, str):
            given["choice"] = list(self.choice)
        found: StructuredOutput = STRUCTURED_FIELDS[_NAME](_NAME, given)
        return found
