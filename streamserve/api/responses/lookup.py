"""What was answered: ``GET`` and ``DELETE /v1/responses/{id}``, ``…/cancel``, ``…/input_items``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from streamserve.api.context import ApiContext
from streamserve.api.disconnect import ClientGoneError
from streamserve.api.fields import FieldTable, Reader, Refused, integer, one_of, read_bool
from streamserve.api.responses.archive import Archive
from streamserve.api.responses.background import BackgroundRun, EventLog, LogResponse
from streamserve.api.responses.fields import read_include
from streamserve.api.responses.items import read_id
from streamserve.api.responses.store import Stored
from streamserve.api.tenants import tenant_of
from streamserve.errors import InvalidParameterError

DEFAULT_LIMIT = 20

# What an item may lack is there or not since it was made: there is nothing to add.
_INCLUDE: dict[str, Reader] = {"include": read_include}
RETRIEVE_TABLE = FieldTable(
    {**_INCLUDE, "starting_after": integer(0), "stream": read_bool},
    {"include_obfuscation": Refused((False,))},
)
ITEMS_TABLE = FieldTable(
    {
        **_INCLUDE,
        "after": read_id,
        "limit": integer(1, 100),
        "order": one_of("asc", "desc"),
    }
)


def read_query(query: QueryParams, table: FieldTable) -> dict[str, Any]:
    """The parameters of a URL, through the table of a body: text stands for what it says."""
    given: dict[str, Any] = {}
    for name, text in query.multi_items():
        if name.removesuffix("[]") == "include":
            given.setdefault("include", []).append(text)
        else:
            given[name] = _VALUES.get(text, text)
    for name in ("limit", "starting_after"):
        text = given.get(name, "")
        if isinstance(text, str) and text.isascii() and text.isdigit() and len(text) < 16:
            given[name] = int(text)
    return table.read(given)[0]


_VALUES: Mapping[str, bool] = {"true": True, "false": False}


class StoredResponses:
    """The methods that look at responses, and end them."""

    def __init__(self, context: ApiContext, archive: Archive) -> None:
        self._context = context
        self._archive = archive

    async def delete(self, request: Request) -> Response:
        """Forget a response."""
        response_id = request.path_params["response_id"]
        self._archive.delete(response_id, tenant_of(request.scope).name)
        return _json({"id": response_id, "object": "response.deleted", "deleted": True})

    async def cancel(self, request: Request) -> Response:
        """End a response in the background. One that has ended stays as it is."""
        found = self._find(request)
        if isinstance(found, BackgroundRun):
            found.cancel()
        elif found.events is None:
            raise InvalidParameterError(
                "Only responses with background: true can be cancelled",
                param="response_id",
                code="invalid_value",
            )
        return Response(found.response, media_type="application/json")

    async def input_items(self, request: Request) -> Response:
        """What the model read, page by page."""
        values = read_query(request.query_params, ITEMS_TABLE)
        items = self._find(request).turn.all_input()
        if values.get("order", "desc") == "desc":
            items.reverse()
        start = 0
        if (after := values.get("after")) is not None:
            ids = [item["id"] for item in items]
            if after not in ids:
                raise InvalidParameterError(
                    f"after: there is no item with id {after!r}", param="after", code="not_found"
                )
            start = ids.index(after) + 1
        end = start + values.get("limit", DEFAULT_LIMIT)
        page = items[start:end]
        return _json(
            {
                "object": "list",
                "data": page,
                "first_id": page[0]["id"] if page else None,
                "last_id": page[-1]["id"] if page else None,
                "has_more": end < len(items),
            }
        )

    def _find(self, request: Request) -> Stored | BackgroundRun:
        return self._archive.find(request.path_params["response_id"], tenant_of(request.scope).name)


class Retrieve:
    """``GET /v1/responses/{id}``: the response, or the events of one in the background."""

    def __init__(self, context: ApiContext, archive: Archive) -> None:
        self._context = context
        self._archive = archive

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response_id = scope["path_params"]["response_id"]
        values = read_query(QueryParams(scope["query_string"]), RETRIEVE_TABLE)
        if "starting_after" in values and not values.get("stream", False):
            raise InvalidParameterError(
                "starting_after may be given only with stream: true",
                param="starting_after",
                code="invalid_value",
            )
        found = self._archive.find(response_id, tenant_of(scope).name)
        if not values.get("stream", False):
            response = Response(found.response, media_type="application/json")
            await response(scope, receive, send)
            return
        answer = LogResponse(
            response_id,
            log_of(found),
            values.get("starting_after", -1) + 1,
            **self._context.sse_options(scope, {}),
        )
        try:
            with self._context.gate.enter(goes_on=True):
                await answer(scope, receive, send)
        except ClientGoneError:
            return


def log_of(found: Stored | BackgroundRun) -> EventLog:
    """The events so far. Raises ``InvalidParameterError`` if they were not kept."""
    if isinstance(found, BackgroundRun):
        return found.log
    if found.events is None:
        raise InvalidParameterError(
            "stream: true may be given only for responses with background: true",
            param="stream",
            code="invalid_value",
        )
    return EventLog(found.events, is_complete=True)


def _json(content: dict[str, Any]) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")
