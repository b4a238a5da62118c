"""The fields of ``POST /v1/responses`` that other endpoints have not, read from JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from streamserve.api.chat_request import read_effort
from streamserve.api.fields import (
    FieldTable,
    Refused,
    check_keys,
    list_of,
    nested,
    one_of,
    out_of_range,
    read_bool,
    read_object,
    read_str,
    require_in,
    typed,
)
from streamserve.api.sampling import StreamOptions
from streamserve.api.structured import any_object, check_described, json_schema
from streamserve.core.structured_output import StructuredOutput

MAX_METADATA = 16
MAX_METADATA_KEY = 64
MAX_METADATA_VALUE = 512

LOGPROBS = "message.output_text.logprobs"
ENCRYPTED = "reasoning.encrypted_content"
# The rest is about items that no answer here has: there is nothing to include.
INCLUDABLE = (
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    LOGPROBS,
    ENCRYPTED,
    "web_search_call.action.sources",
    "web_search_call.results",
)
_FORMATS = ("text", "json_object", "json_schema")
# The thoughts themselves are as detailed as a summary can be.
_SUMMARIES = ("auto", "detailed")


read_include = list_of(one_of(*INCLUDABLE), "names of what to include", 64)
read_truncation = one_of("auto", "disabled")


@typed(
    {
        "type": "object",
        "maxProperties": MAX_METADATA,
        "propertyNames": {"maxLength": MAX_METADATA_KEY},
        "additionalProperties": {"type": "string", "maxLength": MAX_METADATA_VALUE},
        "description": "Up to 16 strings by name, which the response repeats.",
    }
)
def read_metadata(name: str, value: Any) -> dict[str, str]:
    """``metadata``."""
    pairs = read_object(name, value)
    if len(pairs) > MAX_METADATA:
        raise out_of_range(name, f"an object of at most {MAX_METADATA} entries", value)
    for key, text in pairs.items():
        if len(key) > MAX_METADATA_KEY:
            raise out_of_range(name, f"keyed by at most {MAX_METADATA_KEY} characters", key)
        if len(read_str(f"{name}.{key}", text)) > MAX_METADATA_VALUE:
            limit = f"a string of at most {MAX_METADATA_VALUE} characters"
            raise out_of_range(f"{name}.{key}", limit, text)
    return pairs


@dataclass(frozen=True, slots=True)
class TextFormat:
    """``text``: what the answer looks like. ``shown`` is how the response repeats it."""

    shown: dict[str, Any]
    grammar: StructuredOutput | None


PLAIN_TEXT = TextFormat({"format": {"type": "text"}, "verbosity": "medium"}, None)

_FORMAT_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {
            "type": "object",
            "properties": {"type": {"enum": ["text", "json_object"]}},
            "required": ["type"],
            "additionalProperties": False,
        },
        {
            "type": "object",
            "properties": {
                "type": {"const": "json_schema"},
                "name": {"type": "string"},
                "schema": {"type": "object"},
                "description": {"type": ["string", "null"]},
                "strict": {"type": ["boolean", "null"]},
            },
            "required": ["type", "name", "schema"],
            "additionalProperties": False,
        },
    ],
    "description": "Text, a JSON object, or JSON of a schema, which is always followed to the "
    "letter.",
}


@typed(_FORMAT_SCHEMA)
def _read_format(name: str, value: Any) -> tuple[dict[str, Any], StructuredOutput | None]:
    given = read_object(name, value)
    kind = read_str(f"{name}.type", require_in(given, "type", name))
    if kind not in _FORMATS:
        raise out_of_range(f"{name}.type", f"one of {', '.join(_FORMATS)}", kind)
    known = {"type", "name", "schema", "description", "strict"}
    check_keys(name, given, known if kind == "json_schema" else {"type"})
    if kind == "text":
        return {"type": kind}, None
    if kind == "json_object":
        return {"type": kind}, any_object(name)
    check_described(name, given)
    require_in(given, "name", name)
    where = f"{name}.schema"
    schema = read_object(where, require_in(given, "schema", name))
    shown = {"description": None, "strict": True, **given}
    return shown, json_schema(where, schema)


TEXT_TABLE = FieldTable({"format": _read_format}, {"verbosity": Refused(("medium",))})


@nested({**TEXT_TABLE.schema(), "description": "What the answer looks like."})
def read_text(name: str, value: Any, unknown: list[str]) -> TextFormat:
    """``text``."""
    values = TEXT_TABLE.read_inner(name, value, unknown)
    shown, grammar = values.get("format", (PLAIN_TEXT.shown["format"], None))
    return TextFormat({**PLAIN_TEXT.shown, "format": shown}, grammar)


@dataclass(frozen=True, slots=True)
class ReasoningFields:
    """``reasoning``: how hard to think, and whether the thoughts are shown as a summary."""

    effort: str | None = None
    summary: str | None = None


_read_summary = one_of(*_SUMMARIES)
REASONING_TABLE = FieldTable(
    {
        "effort": read_effort,
        "generate_summary": _read_summary,
        "summary": _read_summary,
    },
    {"context": Refused(("auto", "all_turns")), "mode": Refused(("standard",))},
)


@nested({**REASONING_TABLE.schema(), "description": "How to think, and how to show it."})
def read_reasoning(name: str, value: Any, unknown: list[str]) -> ReasoningFields:
    """``reasoning``."""
    values = REASONING_TABLE.read_inner(name, value, unknown)
    summary = values.get("summary", values.get("generate_summary"))
    return ReasoningFields(values.get("effort"), summary)


STREAM_TABLE = FieldTable(
    {"include_progress": read_bool}, {"include_obfuscation": Refused((False,))}
)


@nested(STREAM_TABLE.schema())
def read_stream_options(name: str, value: Any, unknown: list[str]) -> StreamOptions:
    """``stream_options``."""
    return StreamOptions(**STREAM_TABLE.read_inner(name, value, unknown))
