"""`/v1/models` and `/v1/messages/count_tokens`: passed on to the caller's own upstream, which knows best."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from claude_wrapper.api.bodies import read_body
from claude_wrapper.api.caching import cache_use
from claude_wrapper.api.credentials import HEADER as CREDENTIAL_HEADER
from claude_wrapper.api.state import deps_of
from claude_wrapper.errors import InvalidRequest, PermissionDenied
from claude_wrapper.ids import well_formed
from claude_wrapper.wire.messages import parse_messages_request


async def list_models(request: Request) -> Response:
    """The models that the caller's upstream offers."""
    return await _forward(request, "read:models", "GET", f"/v1/models?{request.url.query}".rstrip("?"))


async def get_model(request: Request) -> Response:
    """One model, by id or alias."""
    model = str(request.path_params["model"])
    if not well_formed(f"m_{model.replace('.', '_').replace(':', '_').replace('@', '_')}"):
        raise InvalidRequest("is not a model's name", field="model")
    deps = deps_of(request)
    return await _forward(request, "read:models", "GET", f"/v1/models/{deps.settings.model_aliases.get(model, model)}")


async def count_tokens(request: Request) -> Response:
    """Tokens of a request, counted by the upstream."""
    deps = deps_of(request)
    body = await read_body(request, deps.settings.max_body_bytes)
    parsed = parse_messages_request(body, max_tokens_required=False)
    return await _forward(request, "write:messages", "POST", "/v1/messages/count_tokens", body, model=parsed.model)


async def _forward(
    request: Request, scope: str, method: str, path: str, body: bytes | None = None, *, model: str | None = None
) -> Response:
    deps = deps_of(request)
    principal = await deps.authenticate(request)
    principal.require(scope)
    if model is not None and not principal.may_use(model):
        raise PermissionDenied(f"model: this key may not use {model}")
    credential = await deps.credentials.choose(principal, None, named=request.headers.get(CREDENTIAL_HEADER))
    use = cache_use(request.headers)
    answer = await deps.direct.ask(credential, method, path, body, org=principal.org, use=use)
    headers = {"cw-cache": answer.cache} if answer.cache is not None else None
    return Response(answer.body, status_code=answer.status, media_type="application/json", headers=headers)
