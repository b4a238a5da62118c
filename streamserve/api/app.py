"""The ASGI application: routes, middlewares, and the small endpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from streamserve.api.adapters import AdapterEndpoints
from streamserve.api.context import ApiContext
from streamserve.api.embeddings import EmbeddingEndpoint
from streamserve.api.errors import EXCEPTION_HANDLERS
from streamserve.api.faults import FaultEndpoint
from streamserve.api.gate import Gate
from streamserve.api.generation import ChatEndpoint, CompletionEndpoint
from streamserve.api.kept import KeptAnswers
from streamserve.api.kept_generation import StreamEndpoint
from streamserve.api.messages import CountTokensEndpoint, MessagesEndpoint
from streamserve.api.metrics import Metrics, MetricsRegistry
from streamserve.api.middleware import RAW_SEND, ApiKeyMiddleware, RequestIdMiddleware
from streamserve.api.openapi import openapi
from streamserve.api.operators import OperatorEndpoints, admin_app
from streamserve.api.pages import page_routes
from streamserve.api.prompt_workers import PromptWorkers, TextLoader
from streamserve.api.prompts import PromptReader
from streamserve.api.rate_limits import RateLimiter
from streamserve.api.request_log import RequestLog
from streamserve.api.responses.archive import Archive
from streamserve.api.responses.endpoint import InputTokensEndpoint, ResponsesEndpoint
from streamserve.api.responses.lookup import Retrieve, StoredResponses
from streamserve.api.responses.store import ResponseStore
from streamserve.api.running import cancel_routes
from streamserve.api.sampling import sampling_defaults
from streamserve.api.served_models import ServedModels
from streamserve.api.tenants import KeyRing
from streamserve.api.tokens import TokenEndpoints
from streamserve.config import ApiConfig, EmbeddingConfig
from streamserve.core.clock import Clock, monotonic
from streamserve.engine.adapters import Adapter, Adapters
from streamserve.engine.async_engine import AsyncEngine
from streamserve.engine.fault_injection import FaultInjectingRunner
from streamserve.engine.hang_watch import HangWatch
from streamserve.engine.parsers.answer_format import AnswerFormat
from streamserve.engine.preprocess import Preprocessor
from streamserve.engine.tokenizer import Tokenizer

_EXPOSED_HEADERS = (
    "X-Request-Id",
    "request-id",
    "X-Ignored-Fields",
    "X-Stream-Id",
    "Retry-After",
    "retry-after-ms",
    *(
        f"x-ratelimit-{what}-{of}"
        for of in ("requests", "tokens")
        for what in ("limit", "remaining", "reset")
    ),
)


_NO_FORMAT = AnswerFormat()
_EMBEDDING = EmbeddingConfig()


class ApiApp(Starlette):
    """Starlette, and the server's own ``send`` left in the scope for the token path."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[RAW_SEND] = send
        # A proxy may have taken the prefix off or not: routing finds either.
        scope["root_path"] = self.context.config.root_path
        await super().__call__(scope, receive, send)

    admin: Starlette | None = None
    """What listens on ``config.admin_port``."""

    @property
    def context(self) -> ApiContext:
        """What the endpoints share."""
        context: ApiContext = self.state.context
        return context


def create_app(
    *,
    engine: AsyncEngine,
    preprocessor: Preprocessor,
    tokenizer: Tokenizer,
    config: ApiConfig,
    max_model_len: int,
    generation_config: Mapping[str, Any] | None = None,
    answer_format: AnswerFormat = _NO_FORMAT,
    embedding: EmbeddingConfig = _EMBEDDING,
    clock: Clock = monotonic,
    wall_clock: Callable[[], float] = time.time,
    load_text: TextLoader | None = None,
    faults: FaultInjectingRunner | None = None,
    adapters: Adapters | None = None,
) -> ApiApp:
    """Build the application around a started engine (``serve`` starts it).

    ``generation_config`` is the model's own: of it ``GENERATION_CONFIG_FIELDS`` become the sampling
    defaults. ``load_text``, which must be picklable, loads the tokenizer and the template in the
    processes that read long bodies; without one they are read here. ``answer_format`` says how the
    model writes thoughts and tool calls, ``embedding`` what vectors it makes. ``faults``, the
    engine's runner, opens ``/debug``. ``adapters`` are served as models of their names. Raises
    ``ConfigError`` if a default is out of range or the file of API keys cannot be used.
    """
    metrics = Metrics()
    gate = Gate(retry_after_s=config.drain_timeout_s)
    keys = KeyRing(config.api_keys, config.api_key_file, clock=clock)
    defaults = sampling_defaults(generation_config or {})
    context = ApiContext(
        engine=engine,
        preprocessor=preprocessor,
        tokenizer=tokenizer,
        config=config,
        max_model_len=max_model_len,
        prompts=PromptReader(preprocessor, tokenizer, defaults, answer_format, max_model_len),
        clock=clock,
        wall_clock=wall_clock,
        created=int(wall_clock()),
        metrics=metrics,
        kept=KeptAnswers(config.streams.max_kept_bytes, gate),
        answer_format=answer_format,
        embedding=embedding,
        models=ServedModels(config.served_model_names, adapters),
        keys=keys,
        hang_watch=HangWatch(engine, clock, config.hang_timeout_s),
        gate=gate,
        prompt_workers=None
        if load_text is None
        else PromptWorkers(load_text, defaults, answer_format, max_model_len),
        request_log=RequestLog(
            tokenizer, is_on=config.log_requests, max_characters=config.max_logged_characters
        ),
    )
    registry = MetricsRegistry(
        metrics,
        engine,
        config.served_model_names[0],
        # On the public port anybody could read who the others are.
        shows_tenants=config.admin_port is not None,
    )
    operators = OperatorEndpoints(context, registry)
    admin_routes = _admin_routes(context, operators, faults, adapters)
    routes = [*_public_routes(context), *operators.health_routes()]
    if config.admin_port is None:
        routes += admin_routes
    key_check = Middleware(
        ApiKeyMiddleware, keys=keys, limiter=RateLimiter(clock), on_refused=metrics.refused
    )
    guards = [] if keys.is_empty else [key_check]
    app = ApiApp(
        routes=routes,
        middleware=[*_outer_middleware(config), *guards],
        exception_handlers=dict(EXCEPTION_HANDLERS),
    )
    # A redirect would make a client repeat its POST elsewhere, or drop its body: 404 is clearer.
    app.router.redirect_slashes = False
    app.state.context = context
    if config.admin_port is not None:
        app.admin = admin_app([*operators.health_routes(), *admin_routes], guards)
    return app


def _admin_routes(
    context: ApiContext,
    operators: OperatorEndpoints,
    faults: FaultInjectingRunner | None,
    adapters: Adapters | None,
) -> list[Route]:
    routes = operators.admin_routes()
    if faults is not None:
        fault = FaultEndpoint(context, faults)
        routes.append(Route("/debug/inject_fault", fault.__call__, methods=["POST"]))
    if adapters is not None and context.config.updates_adapters:
        routes += AdapterEndpoints(context, adapters).routes()
    return routes


def _public_routes(context: ApiContext) -> list[Route]:
    config = context.config
    small, tokens = _SmallEndpoints(context), TokenEndpoints(context)
    routes = [
        Route("/v1/chat/completions", ChatEndpoint(context), methods=["POST"]),
        Route("/v1/completions", CompletionEndpoint(context), methods=["POST"]),
        Route("/v1/streams/{id}", StreamEndpoint(context), methods=["GET"]),
        *cancel_routes(context.running),
        *_responses_routes(context),
        Route("/v1/messages", MessagesEndpoint(context), methods=["POST"]),
        Route("/v1/messages/count_tokens", CountTokensEndpoint(context), methods=["POST"]),
        Route("/v1/embeddings", EmbeddingEndpoint(context), methods=["POST"]),
        Route("/v1/models", small.models),
        Route("/v1/models/{model:path}", small.model),
        Route("/tokenize", tokens.tokenize, methods=["POST"]),
        Route("/detokenize", tokens.detokenize, methods=["POST"]),
        *page_routes(has_chat=config.has_pages, has_docs=config.has_pages and config.has_docs),
    ]
    if config.has_docs:
        routes.append(Route("/openapi.json", small.openapi))
    return routes


def _responses_routes(context: ApiContext) -> list[Route]:
    config = context.config
    archive = Archive(
        ResponseStore(config.max_stored_responses, config.stored_responses_memory_bytes)
    )
    stored = StoredResponses(context, archive)
    one = "/v1/responses/{response_id}"
    return [
        Route("/v1/responses", ResponsesEndpoint(context, archive), methods=["POST"]),
        Route(
            "/v1/responses/input_tokens", InputTokensEndpoint(context, archive), methods=["POST"]
        ),
        Route(one, Retrieve(context, archive), methods=["GET"]),
        Route(one, stored.delete, methods=["DELETE"]),
        Route(f"{one}/cancel", stored.cancel, methods=["POST"]),
        Route(f"{one}/input_items", stored.input_items),
    ]


def _outer_middleware(config: ApiConfig) -> list[Middleware]:
    """From the outside in. CORS stands before the key: a browser must be able to read a 401."""
    middleware = [Middleware(RequestIdMiddleware)]
    if config.allowed_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=config.allowed_origins,
                allow_credentials=config.allow_credentials,
                allow_methods=config.allowed_methods,
                allow_headers=config.allowed_headers,
                expose_headers=_EXPOSED_HEADERS,
            )
        )
    return middleware


class _SmallEndpoints:
    """The endpoints that only look."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context
        self._openapi: bytes | None = None  # made when first asked for

    async def models(self, _request: Request) -> Response:
        models = self._context.models
        cards = [self._card(name) for name in models.names]
        cards += [self._adapter_card(adapter) for adapter in models.adapters or ()]
        return _json({"object": "list", "data": cards})

    async def model(self, request: Request) -> Response:
        name: str = request.path_params["model"]
        adapter = self._context.models.adapter_of(name)
        return _json(self._card(name) if adapter is None else self._adapter_card(adapter))

    async def openapi(self, _request: Request) -> Response:
        if self._openapi is None:
            self._openapi = orjson.dumps(openapi(has_keys=not self._context.keys.is_empty))
        return Response(self._openapi, media_type="application/json")

    def _adapter_card(self, adapter: Adapter) -> dict[str, Any]:
        base = self._context.models.names[0]
        return self._card(adapter.name) | {"root": str(adapter.path), "parent": base}

    def _card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._context.created,
            "owned_by": "streamserve",
            "root": self._context.config.served_model_names[0],
            "parent": None,
            "max_model_len": self._context.max_model_len,
            "permission": [
                {
                    "id": f"modelperm-{name}",
                    "object": "model_permission",
                    "created": self._context.created,
                    "allow_create_engine": False,
                    "allow_sampling": True,
                    "allow_logprobs": True,
                    "allow_search_indices": False,
                    "allow_view": True,
                    "allow_fine_tuning": False,
                    "organization": "*",
                    "group": None,
                    "is_blocking": False,
                }
            ],
        }


def _json(content: dict[str, Any]) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")
