"""``POST /v1/load_lora_adapter`` and ``/v1/unload_lora_adapter``, as vLLM has them.

The paths exist only where the server runs with ``--allow-runtime-lora-updating``: who may call
them may have the server read any directory.
"""

from __future__ import annotations

import logging
from pathlib import Path

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from streamserve.api.body import parse_json_object
from streamserve.api.context import ApiContext
from streamserve.api.errors import HttpError
from streamserve.api.fields import FieldTable, read_str, require
from streamserve.engine.adapters import Adapters
from streamserve.errors import InvalidParameterError, ModelLoadError

logger = logging.getLogger(__name__)

_MAX_NAME = 256
LOAD_TABLE = FieldTable(
    {"lora_name": read_str, "lora_path": read_str}, required=("lora_name", "lora_path")
)
UNLOAD_TABLE = FieldTable(
    {"lora_name": read_str}, annotations=frozenset({"lora_int_id"}), required=("lora_name",)
)


class AdapterEndpoints:
    """Loads adapters while answers stream, and lets those that run keep theirs to their end."""

    def __init__(self, context: ApiContext, adapters: Adapters) -> None:
        self._context = context
        self._adapters = adapters

    def routes(self) -> list[Route]:
        """Both paths."""
        return [
            Route("/v1/load_lora_adapter", self.load, methods=["POST"]),
            Route("/v1/unload_lora_adapter", self.unload, methods=["POST"]),
        ]

    async def load(self, request: Request) -> Response:
        """Answers when the adapter can be used."""
        values = await self._read(request, LOAD_TABLE)
        name, path = require(values, "lora_name"), Path(require(values, "lora_path"))
        if not name or len(name) > _MAX_NAME or name in self._context.models.names:
            raise InvalidParameterError(
                f"lora_name must have 1 to {_MAX_NAME} characters and be no name of the model, "
                f"got {name[:_MAX_NAME]!r}",
                param="lora_name",
            )
        try:
            await self._adapters.load(name, path)
        except ModelLoadError as error:
            raise InvalidParameterError(str(error), param="lora_path") from error
        logger.info("loaded adapter %r from %s", name, path)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        """Answers at once: no new request gets it, and those that have it go on."""
        name = require(await self._read(request, UNLOAD_TABLE), "lora_name")
        if self._adapters.unload(name) is None:
            raise HttpError(
                404,
                f"The LoRA adapter {name[:_MAX_NAME]!r} cannot be found.",
                param="lora_name",
                code="model_not_found",
            )
        logger.info("unloaded adapter %r", name)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    async def _read(self, request: Request, table: FieldTable) -> dict[str, str]:
        raw = await self._context.read_body(request.scope, request.receive)
        values, unknown = table.read(parse_json_object(raw))
        if unknown:
            raise InvalidParameterError(f"Unknown field: {unknown[0][:64]}", param=unknown[0][:64])
        return values
