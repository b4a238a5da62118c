"""``/openapi.json``, made from the tables that requests are read through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from streamserve import __version__
from streamserve.api.chat_request import CHAT_TABLE, MESSAGE_TABLE
from streamserve.api.completion_request import COMPLETION_TABLE
from streamserve.api.descriptions import DESCRIPTIONS
from streamserve.api.embedding_request import EMBEDDING_TABLE
from streamserve.api.fields import STATUS, FieldTable, Schema, schema_of
from streamserve.api.message_fields import (
    BLOCKS,
    MESSAGE_CHOICE_TABLE,
    MESSAGE_TOOL_TABLE,
    METADATA_TABLE,
    OUTPUT_TABLE,
    THINKING_TABLE,
)
from streamserve.api.message_request import COUNT_TABLE, MESSAGES_TABLE, TURN_TABLE
from streamserve.api.responses import fields as response_fields
from streamserve.api.responses import items as response_items
from streamserve.api.responses.lookup import ITEMS_TABLE, RETRIEVE_TABLE
from streamserve.api.responses.request import RESPONSES_TABLE
from streamserve.api.responses.tools import TOOL_TABLE as FLAT_TOOL_TABLE
from streamserve.api.sampling import STREAM_OPTIONS_TABLE
from streamserve.api.structured import STRUCTURED_OUTPUTS_TABLE
from streamserve.api.token_requests import DETOKENIZE_TABLE, TOKENIZE_TABLE
from streamserve.api.tool_fields import CALL_TABLE, CALLED_TABLE, FUNCTION_TABLE, TOOL_TABLE

_JSON = "application/json"
_INTEGER: Schema = {"type": "integer"}
_STRING: Schema = {"type": "string"}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One POST endpoint: the name of its body's schema, the table of it, and its answer's schema.

    ``example`` is a body that every server answers. ``streams``: the answer may be server-sent
    events.
    """

    path: str
    name: str
    summary: str
    table: FieldTable
    answer: Schema
    example: dict[str, Any]
    streams: bool = False
    cancels: bool = False  # by a request to its own path
    error: str = "Error"  # the name of its errors' schema


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


_USAGE = _object(prompt_tokens=_INTEGER, completion_tokens=_INTEGER, total_tokens=_INTEGER)
_ANSWER = _object(
    id=_STRING,
    object=_STRING,
    created=_INTEGER,
    model=_STRING,
    choices=_array(_object(index=_INTEGER, finish_reason=_STRING)),
    usage=_USAGE,
)
_RESPONSE = _object(
    id=_STRING,
    object=_STRING,
    created_at=_INTEGER,
    status=_STRING,
    model=_STRING,
    output=_array(_object(type=_STRING)),
    usage={"type": ["object", "null"]},
)
_MODEL = _object(id=_STRING, object=_STRING, created=_INTEGER, max_model_len=_INTEGER)
_ERROR = _object(
    error=_object(
        message=_STRING,
        type=_STRING,
        param={"type": ["string", "null"]},
        code={"type": ["string", "null"]},
    )
)
_MESSAGE_ERROR = _object(
    type={"const": "error"},
    error=_object(type=_STRING, message=_STRING),
    request_id=_STRING,
)
_MESSAGE = _object(
    id=_STRING,
    type={"const": "message"},
    role={"const": "assistant"},
    model=_STRING,
    content=_array(_object(type={"enum": ["text", "thinking", "tool_use"]})),
    stop_reason=_STRING,
    stop_sequence={"type": ["string", "null"]},
    usage=_object(
        input_tokens=_INTEGER,
        cache_creation_input_tokens=_INTEGER,
        cache_read_input_tokens=_INTEGER,
        output_tokens=_INTEGER,
    ),
)

ENDPOINTS = (
    Endpoint(
        "/v1/chat/completions",
        "ChatCompletionRequest",
        "Answer a chat",
        CHAT_TABLE,
        _ANSWER,
        {"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 64},
        streams=True,
        cancels=True,
    ),
    Endpoint(
        "/v1/completions",
        "CompletionRequest",
        "Continue a text",
        COMPLETION_TABLE,
        _ANSWER,
        {"prompt": "Once upon a time", "max_tokens": 16},
        streams=True,
        cancels=True,
    ),
    Endpoint(
        "/v1/messages",
        "MessagesRequest",
        "Answer a chat, as Anthropic's API does",
        MESSAGES_TABLE,
        _MESSAGE,
        {"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 64},
        streams=True,
        error="MessagesError",
    ),
    Endpoint(
        "/v1/messages/count_tokens",
        "CountTokensRequest",
        "Count the tokens of a message's prompt",
        COUNT_TABLE,
        _object(input_tokens=_INTEGER),
        {"messages": [{"role": "user", "content": "Tell me a story."}]},
        error="MessagesError",
    ),
    Endpoint(
        "/v1/responses",
        "ResponseRequest",
        "Answer a chat, as OpenAI's Responses API",
        RESPONSES_TABLE,
        _RESPONSE,
        {"input": "Tell me a story.", "max_output_tokens": 64},
        streams=True,
    ),
    Endpoint(
        "/v1/embeddings",
        "EmbeddingRequest",
        "Vectors of texts",
        EMBEDDING_TABLE,
        _object(
            object=_STRING,
            model=_STRING,
            data=_array(
                _object(
                    object=_STRING,
                    index=_INTEGER,
                    embedding={"anyOf": [_array({"type": "number"}), _STRING]},
                )
            ),
            usage=_object(prompt_tokens=_INTEGER, total_tokens=_INTEGER),
        ),
        {"input": ["Once upon a time", "The end"]},
    ),
    Endpoint(
        "/tokenize",
        "TokenizeRequest",
        "Token ids of a text, or of a chat as the template renders it",
        TOKENIZE_TABLE,
        _object(
            count=_INTEGER,
            max_model_len=_INTEGER,
            tokens=_array(_INTEGER),
            token_strs={"type": ["array", "null"], "items": _STRING},
        ),
        {"prompt": "Once upon a time", "return_token_strs": True},
    ),
    Endpoint(
        "/detokenize",
        "DetokenizeRequest",
        "Text of token ids",
        DETOKENIZE_TABLE,
        _object(prompt=_STRING),
        {"tokens": [1, 2, 3]},
    ),
)

OBJECTS = (
    ("stream_options", STREAM_OPTIONS_TABLE),
    ("structured_outputs", STRUCTURED_OUTPUTS_TABLE),
    ("tools[]", TOOL_TABLE),
    ("tools[].function", FUNCTION_TABLE),
    ("messages[]", MESSAGE_TABLE),
    ("messages[].tool_calls[]", CALL_TABLE),
    ("messages[].tool_calls[].function", CALLED_TABLE),
    ("input[] (responses): message", response_items.MESSAGE_TABLE),
    ("input[] (responses): function_call", response_items.CALL_TABLE),
    ("input[] (responses): function_call_output", response_items.RETURN_TABLE),
    ("input[] (responses): reasoning", response_items.REASONING_TABLE),
    ("input[] (responses): item_reference", response_items.REFERENCE_TABLE),
    ("tools[] (responses)", FLAT_TOOL_TABLE),
    ("text (responses)", response_fields.TEXT_TABLE),
    ("reasoning (responses)", response_fields.REASONING_TABLE),
    ("stream_options (responses)", response_fields.STREAM_TABLE),
    ("tools[] of /v1/messages", MESSAGE_TOOL_TABLE),
    ("tool_choice of /v1/messages", MESSAGE_CHOICE_TABLE),
    ("thinking of /v1/messages", THINKING_TABLE),
    ("output_config of /v1/messages", OUTPUT_TABLE),
    ("metadata of /v1/messages", METADATA_TABLE),
    ("messages[] of /v1/messages", TURN_TABLE),
    *((f"messages[].content[] of /v1/messages: {kind}", table) for kind, table in BLOCKS.items()),
)
"""Objects inside of bodies that have a table of their own."""

_LOOKING = (
    ("/v1/models", "The models", "application/json", _object(object=_STRING, data=_array(_MODEL))),
    ("/health", "Whether the server takes requests", "application/json", _object(status=_STRING)),
    ("/live", "Whether the process is of use", "application/json", _object(status=_STRING)),
    ("/ready", "Whether to send requests here", "application/json", _object(status=_STRING)),
    ("/version", "The server's version", "application/json", _object(version=_STRING)),
    ("/metrics", "Counters and histograms for Prometheus", "text/plain", _STRING),
)


_CANCELLED = _object(id=_STRING, object=_STRING, status=_STRING, usage=_USAGE)


def openapi(*, has_keys: bool) -> dict[str, Any]:
    """The document; ``has_keys`` says whether the server asks for a key."""
    paths: dict[str, Any] = {endpoint.path: {"post": _post(endpoint)} for endpoint in ENDPOINTS}
    for path, summary, media_type, schema in _LOOKING:
        paths[path] = {"get": _get(summary, media_type, schema)}
    paths["/v1/models/{model}"] = {
        "get": {
            **_get("One model", "application/json", _MODEL),
            "parameters": [_in_path("model")],
        }
    }
    paths["/v1/streams/{id}"] = {
        "get": {
            **_get("A stream that may be resumed, from Last-Event-ID on", "text/event-stream", {}),
            "parameters": [
                _in_path("id"),
                {"name": "Last-Event-ID", "in": "header", "required": False, "schema": _STRING},
            ],
        }
    }
    for endpoint in ENDPOINTS:
        if endpoint.cancels:
            paths[endpoint.path + "/{id}/cancel"] = {
                "post": {
                    **_get("End an answer that is being made", "application/json", _CANCELLED),
                    "parameters": [_in_path("id")],
                }
            }
    paths |= _response_paths()
    components: dict[str, Any] = {
        "schemas": {
            **{endpoint.name: described(endpoint.table) for endpoint in ENDPOINTS},
            "Error": _ERROR,
            "MessagesError": _MESSAGE_ERROR,
        }
    }
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "streamserve",
            "version": __version__,
            "description": "OpenAI's API over server-sent events. A field's x-status says whether "
            "it is honoured, refused (but for the values that ask for nothing), or accepted "
            "without effect. null means not given.",
        },
        "paths": paths,
        "components": components,
    }
    if has_keys:
        components["securitySchemes"] = {
            "key": {"type": "http", "scheme": "bearer"},
            "x-api-key": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
        }
        document["security"] = [{"key": []}, {"x-api-key": []}]
    return document


def _response_paths() -> dict[str, Any]:
    """What can be done with a response that there is."""
    one = "/v1/responses/{response_id}"
    of_id = _in_path("response_id")
    page = _object(object=_STRING, data=_array(_object(id=_STRING)), has_more={"type": "boolean"})
    deleted = _object(id=_STRING, object=_STRING, deleted={"type": "boolean"})
    retrieve = _get("A response, or the events of one in the background", _JSON, _RESPONSE)
    retrieve["responses"]["200"]["content"]["text/event-stream"] = {"schema": _object(data=_STRING)}
    count = _get("How long a response's prompt would be", _JSON, _object(input_tokens=_INTEGER))
    count["requestBody"] = {
        "required": True,
        "content": {_JSON: {"schema": {"$ref": "#/components/schemas/ResponseRequest"}}},
    }
    return {
        "/v1/responses/input_tokens": {"post": count},
        one: {
            "get": {**retrieve, "parameters": [of_id, *_query(RETRIEVE_TABLE)]},
            "delete": {**_get("Forget a response", _JSON, deleted), "parameters": [of_id]},
        },
        f"{one}/cancel": {
            "post": {
                **_get("End a response in the background", _JSON, _RESPONSE),
                "parameters": [of_id],
            }
        },
        f"{one}/input_items": {
            "get": {
                **_get("What the model read", _JSON, page),
                "parameters": [of_id, *_query(ITEMS_TABLE)],
            }
        },
    }


def _query(table: FieldTable) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "query", "required": False, "schema": schema_of(reader)}
        for name, reader in table.honoured.items()
    ]


def described(table: FieldTable) -> Schema:
    """The table's schema, with what is known of its fields in words."""
    schema = table.schema()
    for name, field in schema["properties"].items():
        if name in DESCRIPTIONS and field[STATUS] == "honoured":
            field.setdefault("description", DESCRIPTIONS[name])
    return schema


def _post(endpoint: Endpoint) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": endpoint.answer}}
    if endpoint.streams:
        content["text/event-stream"] = {"schema": _object(data=_STRING)}  # of each event
    return {
        "summary": endpoint.summary,
        "operationId": endpoint.name,
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {"$ref": f"#/components/schemas/{endpoint.name}"},
                    "example": endpoint.example,
                }
            },
        },
        "responses": {
            "200": {"description": "The answer", "content": content},
            **_errors(endpoint.error),
        },
    }


def _get(summary: str, media_type: str, schema: Schema) -> dict[str, Any]:
    content = {media_type: {"schema": schema}}
    responses = {"200": {"description": summary, "content": content}, **_errors()}
    return {"summary": summary, "responses": responses}


def _in_path(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": _STRING}


def _errors(name: str = "Error") -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
    return {
        "4XX": {"description": "Refused: the message says why", "content": content},
        "5XX": {"description": "Failed", "content": content},
    }
