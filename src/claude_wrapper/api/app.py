"""The application: the route table and the middleware, in order, readable from top to bottom."""

from __future__ import annotations

from typing import Any

import structlog
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from claude_wrapper.api import errors, messages, metrics, models, system
from claude_wrapper.api.admin import ADMIN_ROUTES
from claude_wrapper.api.managed.openapi_sessions import SESSION_ROUTES
from claude_wrapper.api.managed.resources import RESOURCE_ROUTES
from claude_wrapper.api.middleware import InFlight, RequestContext, Watch
from claude_wrapper.api.openapi import describe
from claude_wrapper.api.state import Deps
from claude_wrapper.errors import (
    AuthenticationFailed,
    Conflict,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    RequestTooLarge,
    WrapperError,
)

log = structlog.get_logger(__name__)

# Hot routes are plain Starlette routes: FastAPI's own cost three times as much per request (measured).
ROUTES: tuple[Route, ...] = (
    Route("/", system.overview, methods=["GET"]),
    Route("/livez", system.livez, methods=["GET"]),
    Route("/readyz", system.readyz, methods=["GET"]),
    Route("/health", system.health, methods=["GET"]),
    Route("/v1/messages", messages.create_message, methods=["POST"]),
    Route("/v1/messages/pooled", messages.create_message_pooled, methods=["POST"]),
    Route("/v1/messages/count_tokens", models.count_tokens, methods=["POST"]),
    Route("/v1/models", models.list_models, methods=["GET"]),
    Route("/v1/models/{model}", models.get_model, methods=["GET"]),
    Route("/v1/pool/stats", system.pool_stats, methods=["GET"]),
    Route("/metrics", metrics.metrics, methods=["GET"]),
    Route("/api/metrics", metrics.metrics, methods=["GET"]),
    Route("/v1/security", system.security, methods=["GET"]),
    *ADMIN_ROUTES,
    *RESOURCE_ROUTES,
    *SESSION_ROUTES,
)


def create_app(deps: Deps, *, watch: Watch, flight: InFlight) -> FastAPI:
    """The ASGI application over these collaborators."""
    app = FastAPI(
        title="claude-wrapper",
        version=deps.version,
        description="The unmodified Claude CLI as a multi-tenant service.",
        default_response_class=Response,
    )
    app.state.deps = deps
    app.router.routes.extend(ROUTES)
    app.openapi = lambda: describe(app)  # type: ignore[method-assign]
    app.add_exception_handler(WrapperError, errors.on_wrapper_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_error)
    paths = {route.endpoint: route.path for route in app.routes if isinstance(route, Route)}
    app.add_middleware(RequestContext, clock=deps.clock, ids=deps.ids, watch=watch, flight=flight, paths=paths)
    return app


_BY_STATUS: dict[int, type[WrapperError]] = {
    400: InvalidRequest,
    401: AuthenticationFailed,
    403: PermissionDenied,
    404: NotFound,
    409: Conflict,
    413: RequestTooLarge,
}


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for this class only
    if error.status_code == 404:
        message = f"there is no {request.method} {request.url.path}; GET / lists what there is"
    elif error.status_code == 405:
        message = f"{request.url.path} does not take {request.method}; GET / lists what it takes"
    else:
        message = str(error.detail)
    response = errors.response(_BY_STATUS.get(error.status_code, WrapperError)(message), errors.request_id_of(request))
    response.status_code = error.status_code
    response.headers.update(error.headers or {})
    return response


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for this class only
    first: dict[str, Any] = dict(error.errors()[0]) if error.errors() else {}
    field = ".".join(str(part) for part in first.get("loc", ()) if part not in {"body", "query", "path"})
    return errors.response(
        InvalidRequest(first.get("msg", "not valid"), field=field or None), errors.request_id_of(request)
    )


async def _on_disconnect(request: Request, error: Exception) -> Response:
    """Nobody reads this; the status is for the log line (499: the client closed the request)."""
    del request, error
    return Response(status_code=499)


async def _on_error(request: Request, error: Exception) -> Response:
    log.error("request.failed", exc_info=error, path=request.url.path)
    return errors.response(
        WrapperError("the server failed to handle this request; its log has the details under this request id"),
        errors.request_id_of(request),
    )
