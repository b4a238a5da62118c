"""What operators and balancers ask: is it alive, does it take requests, what does it count."""

from __future__ import annotations

from collections.abc import Sequence

import orjson
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from streamserve import __version__
from streamserve.api.context import ApiContext
from streamserve.api.errors import EXCEPTION_HANDLERS
from streamserve.api.metrics import MetricsRegistry
from streamserve.api.middleware import RequestIdMiddleware


class OperatorEndpoints:
    """Answered by the event loop itself, without a place in any queue: also under load."""

    def __init__(self, context: ApiContext, registry: MetricsRegistry) -> None:
        self._context = context
        self._registry = registry

    def health_routes(self) -> list[Route]:
        """What balancers ask: on every port."""
        return [
            Route("/health", self.health),
            Route("/live", self.live),
            Route("/ready", self.ready),
        ]

    def admin_routes(self) -> list[Route]:
        """What is nobody's business but the operator's: it may move to a port of its own."""
        routes = [Route("/version", self.version)]
        if self._context.config.has_metrics:
            routes.append(Route("/metrics", self.metrics))
        return routes

    async def health(self, _request: Request) -> Response:
        """vLLM's: whether requests are taken."""
        return self._state()

    async def ready(self, _request: Request) -> Response:
        """Whether requests should be sent here: not while it drains, hangs, or is dead."""
        return self._state()

    async def live(self, _request: Request) -> Response:
        """Whether the process is of use: 503 asks for its end. One that drains is."""
        context = self._context
        if context.engine.is_dead:
            return _status("dead", 503)
        stalled_s = context.hang_watch.stalled_s()
        if stalled_s >= context.hang_watch.limit_s:
            return _status("hung", 503, stalled_s=round(stalled_s, 1))
        return _status("ok")

    async def version(self, _request: Request) -> Response:
        """Of streamserve."""
        return Response(orjson.dumps({"version": __version__}), media_type="application/json")

    async def metrics(self, _request: Request) -> Response:
        """For Prometheus."""
        return Response(self._registry.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    def _state(self) -> Response:
        context = self._context
        if context.engine.is_dead:
            return _status("dead", 503)
        if not context.gate.is_open:
            response = _status("draining", 503)
            response.headers.update(context.gate.refusal().headers)
            return response
        if context.hang_watch.is_hung:
            return _status("hung", 503)
        return _status("ok")


def _status(status: str, code: int = 200, **more: object) -> Response:
    content = orjson.dumps({"status": status, **more})
    return Response(content, status_code=code, media_type="application/json")


def admin_app(routes: Sequence[Route], guards: Sequence[Middleware]) -> Starlette:
    """The application of the port that only operators reach.

    ``guards`` ask for a key where the public port would: for ``/debug``, and not for metrics.
    """
    app = Starlette(
        routes=routes,
        middleware=[Middleware(RequestIdMiddleware), *guards],
        exception_handlers=dict(EXCEPTION_HANDLERS),
    )
    app.router.redirect_slashes = False
    return app
