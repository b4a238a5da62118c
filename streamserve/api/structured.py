"""What an answer must look like: OpenAI's ``response_format``, vLLM's fields, one grammar.

Old vLLM servers took ``guided_json`` and its like, newer ones take ``structured_outputs``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import orjson

from streamserve.api.fields import (
    FieldTable,
    Reader,
    check_keys,
    list_of,
    out_of_range,
    read_bool,
    read_object,
    read_str,
    require_in,
    schema_of,
    shown,
    typed,
    unsupported,
    wrong_type,
)
from streamserve.api.structural_tag import dumps, read_tree
from streamserve.core.structured_output import GrammarKind, StructuredOutput
from streamserve.errors import InvalidParameterError

MAX_CHOICES = 4096
_BACKENDS = ("auto", "guidance")
_NO_WHITESPACE = ""
_RESPONSE_FORMATS = ("text", "json_object", "json_schema", "structural_tag", "json", "regex")
_SCHEMA_FIELDS = ("schema", "value")
"""Of ``json_object`` and ``json``: llama.cpp's name for the schema, and TGI's."""
_OF_JSON = (GrammarKind.JSON_SCHEMA, GrammarKind.STRUCTURAL_TAG)


def json_schema(name: str, schema: Any) -> StructuredOutput:
    """The grammar of JSON that follows ``schema``, the value of the field ``name``."""
    try:
        text = orjson.dumps(schema).decode()
    except (orjson.JSONEncodeError, UnicodeDecodeError) as exc:
        raise InvalidParameterError(
            f"{name} cannot be written as JSON: {exc}", param=name, code="invalid_value"
        ) from exc
    return StructuredOutput(kind=GrammarKind.JSON_SCHEMA, text=text, param=name)


def any_object(name: str) -> StructuredOutput:
    """A JSON object, because of the field ``name``."""
    return json_schema(name, {"type": "object"})


@typed({"type": ["object", "string"]})
def _read_schema(name: str, value: Any) -> StructuredOutput:
    """A schema as JSON or, as vLLM allows, as a string of JSON."""
    return json_schema(name, _object_or_json(name, value))


@typed({"type": ["object", "string"]})
def _read_structural_tag(name: str, value: Any) -> StructuredOutput:
    """Of type ``structural_tag`` as JSON or, as vLLM has it, as a string of JSON."""
    return _structural_tag(name, _object_or_json(name, value))


def _structural_tag(name: str, value: dict[str, Any]) -> StructuredOutput:
    text = dumps(name, read_tree(name, value))
    return StructuredOutput(kind=GrammarKind.STRUCTURAL_TAG, text=text, param=name)


def _object_or_json(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError as exc:
            raise InvalidParameterError(
                f"{name} must hold JSON: {exc}", param=name, code="invalid_value"
            ) from exc
    if not isinstance(value, dict):
        raise wrong_type(name, "an object or a string that holds one", value)
    return value


@typed({"type": "string", "minLength": 1})
def _read_regex(name: str, value: Any) -> StructuredOutput:
    return StructuredOutput(kind=GrammarKind.REGEX, text=_non_empty(name, value), param=name)


@typed({"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_CHOICES})
def _read_choice(name: str, value: Any) -> StructuredOutput:
    choices: tuple[str, ...] = list_of(read_str, "strings", MAX_CHOICES)(name, value)
    if not choices:
        raise out_of_range(name, "an array of at least one string", value)
    try:
        text = orjson.dumps(choices).decode()
    except orjson.JSONEncodeError as exc:  # half of a surrogate pair
        raise out_of_range(name, "an array of strings of whole characters", value) from exc
    return StructuredOutput(kind=GrammarKind.CHOICE, text=text, param=name)


@typed({"type": "string", "minLength": 1})
def _read_grammar(name: str, value: Any) -> StructuredOutput:
    return StructuredOutput(kind=GrammarKind.LARK, text=_non_empty(name, value), param=name)


@typed({"type": "boolean"})
def _read_json_object(name: str, value: Any) -> StructuredOutput | None:
    return any_object(name) if read_bool(name, value) else None


def _non_empty(name: str, value: Any) -> str:
    text = read_str(name, value)
    if not text:
        raise out_of_range(name, "a non-empty string", value)
    return text


_CONSTRAINTS: dict[str, Reader] = {
    "json": _read_schema,
    "regex": _read_regex,
    "choice": _read_choice,
    "grammar": _read_grammar,
    "json_object": _read_json_object,
    "structural_tag": _read_structural_tag,
}
_OPTIONS: dict[str, Reader] = {
    "disable_additional_properties": read_bool,
    "disable_any_whitespace": read_bool,
    "disable_fallback": read_bool,  # there is one backend: nothing to fall back to
    "whitespace_pattern": read_str,
}


STRUCTURED_OUTPUTS_TABLE = FieldTable({**_CONSTRAINTS, **_OPTIONS})


@typed(STRUCTURED_OUTPUTS_TABLE.closed_schema())
def _read_structured_outputs(name: str, value: Any) -> StructuredOutput:
    given = {key: v for key, v in read_object(name, value).items() if v is not None}
    values = STRUCTURED_OUTPUTS_TABLE.read_closed(name, given)
    found = {key: values[key] for key in _CONSTRAINTS if values.get(key) is not None}
    output = _only_one(name, found)
    if output is None:
        raise InvalidParameterError(
            f"{name} must hold one of {', '.join(_CONSTRAINTS)}", param=name, code="invalid_value"
        )
    if values.get("disable_additional_properties") and output.kind in _OF_JSON:
        output = replace(output, text=dumps(name, _closed(orjson.loads(output.text))))
    whitespace = values.get("whitespace_pattern")
    if values.get("disable_any_whitespace"):
        whitespace = _NO_WHITESPACE
    return _with_whitespace(output, f"{name}.whitespace_pattern", whitespace)


def _closed(schema: Any) -> Any:
    """The schema with no properties allowed but those it names, wherever it says nothing else."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if "additionalProperties" not in schema and (
        "properties" in schema or "patternProperties" in schema
    ):
        closed["additionalProperties"] = False
    return closed


_FIELDS_OF = {
    "json_object": _SCHEMA_FIELDS,
    "json": _SCHEMA_FIELDS,
    "json_schema": ("json_schema",),
    "regex": ("value",),
}
_DESCRIBED_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": ["string", "null"]},
        "description": {"type": ["string", "null"]},
        "strict": {"type": ["boolean", "null"]},
        "schema": {"type": ["object", "null"]},
    },
    "additionalProperties": False,
}


@typed(
    {
        "anyOf": [
            {
                "type": "object",
                "properties": {"type": {"const": "text"}},
                "required": ["type"],
                "additionalProperties": False,
            },
            {
                "type": "object",
                "properties": {
                    "type": {"enum": ["json_object", "json"]},
                    **{name: {"type": ["object", "string", "null"]} for name in _SCHEMA_FIELDS},
                },
                "required": ["type"],
                "additionalProperties": False,
            },
            {
                "type": "object",
                "properties": {"type": {"const": "regex"}, "value": schema_of(_read_regex)},
                "required": ["type", "value"],
                "additionalProperties": False,
            },
            {
                "type": "object",
                "properties": {"type": {"const": "json_schema"}, "json_schema": _DESCRIBED_SCHEMA},
                "required": ["type", "json_schema"],
                "additionalProperties": False,
            },
            {
                "type": "object",
                "properties": {"type": {"const": "structural_tag"}},
                "required": ["type"],
            },
        ]
    }
)
def _read_response_format(name: str, value: Any) -> StructuredOutput | None:
    given = read_object(name, value)
    kind = read_str(f"{name}.type", given.get("type", ""))
    if kind not in _RESPONSE_FORMATS:
        raise out_of_range(f"{name}.type", f"one of {', '.join(_RESPONSE_FORMATS)}", kind)
    if kind == "structural_tag":
        return _structural_tag(name, given)
    check_keys(name, given, {"type", *_FIELDS_OF.get(kind, ())})
    if kind == "text":
        return None
    if kind == "regex":
        return _read_regex(f"{name}.value", require_in(given, "value", name))
    if kind in ("json_object", "json"):
        found = {key: given[key] for key in _SCHEMA_FIELDS if given.get(key) is not None}
        read = {key: _read_schema(f"{name}.{key}", value) for key, value in found.items()}
        return _only_one(name, read) or any_object(name)
    where = f"{name}.json_schema"
    if given.get("json_schema") is None:
        raise InvalidParameterError(
            f"{where} is required", param=where, code="missing_required_parameter"
        )
    described = read_object(where, given["json_schema"])
    check_keys(where, described, {"description", "name", "schema", "strict"})
    # A schema is followed to the letter whether or not that is asked for.
    check_described(where, described)
    schema = described.get("schema")
    if schema is None:
        return any_object(name)
    return json_schema(f"{where}.schema", read_object(f"{where}.schema", schema))


@typed({"enum": list(_BACKENDS)})
def _read_backend(name: str, value: Any) -> str:
    backend = read_str(name, value)
    if backend not in _BACKENDS:
        allowed = ", ".join(_BACKENDS)
        raise unsupported(name, f"{shown(backend)} is not supported: it is one of {allowed}")
    return backend


def check_described(where: str, given: Mapping[str, Any]) -> None:
    """Check the types of what is said about a schema."""
    for key, reader in (("name", read_str), ("description", read_str), ("strict", read_bool)):
        if given.get(key) is not None:
            reader(f"{where}.{key}", given[key])


STRUCTURED_FIELDS: dict[str, Reader] = {
    "guided_choice": _read_choice,
    "guided_decoding_backend": _read_backend,
    "guided_grammar": _read_grammar,
    "guided_json": _read_schema,
    "guided_regex": _read_regex,
    "guided_whitespace_pattern": read_str,
    "response_format": _read_response_format,
    "structured_outputs": _read_structured_outputs,
}
_GRAMMAR_FIELDS = (
    "guided_choice", "guided_grammar", "guided_json", "guided_regex", "response_format",
    "structured_outputs",
)  # fmt: skip


def structured_output(values: Mapping[str, Any]) -> StructuredOutput | None:
    """The grammar that a request's fields, as read, ask for together."""
    found = {name: values[name] for name in _GRAMMAR_FIELDS if values.get(name) is not None}
    output = _only_one(None, found)
    pattern = values.get("guided_whitespace_pattern")
    if output is None:
        if pattern is not None:
            raise _needs_json("guided_whitespace_pattern")
        return None
    return _with_whitespace(output, "guided_whitespace_pattern", pattern)


def _only_one(name: str | None, found: Mapping[str, StructuredOutput]) -> StructuredOutput | None:
    names: Sequence[str] = [key if name is None else f"{name}.{key}" for key in found]
    if len(names) > 1:
        raise InvalidParameterError(
            f"{names[0]} and {names[1]} both say what the answer looks like: give one",
            param=name or names[1],
            code="invalid_value",
        )
    return next(iter(found.values()), None)


def _with_whitespace(output: StructuredOutput, name: str, pattern: str | None) -> StructuredOutput:
    if pattern is None:
        return output
    if output.kind not in _OF_JSON:
        raise _needs_json(name)
    return replace(output, whitespace_pattern=pattern)


def _needs_json(name: str) -> InvalidParameterError:
    return InvalidParameterError(
        f"{name} may be given only with a JSON grammar", param=name, code="invalid_value"
    )
