"""Reading a request body within its bound."""

from __future__ import annotations

from starlette.requests import Request

from claude_wrapper.errors import RequestTooLarge


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body. Raises RequestTooLarge as soon as it is known to exceed `limit` bytes; nothing is kept of it."""
    declared = request.headers.get("content-length")
    if declared is not None and declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise _too_large(limit)
        parts.append(part)
    return b"".join(parts)


def _too_large(limit: int) -> RequestTooLarge:
    return RequestTooLarge(f"the request body is larger than {limit} bytes (limit: max_body_bytes)")
