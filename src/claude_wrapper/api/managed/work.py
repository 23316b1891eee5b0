"""`/v1/environments/{id}/work…`: the queue that the workers of self-hosted environments serve."""

from __future__ import annotations

from typing import Final

from starlette.responses import Response
from starlette.routing import Route

from claude_wrapper.api.managed.resource_common import Call, answer, get, page_answer, post
from claude_wrapper.api.managed.workers import WORK, require_worker
from claude_wrapper.errors import InvalidRequest
from claude_wrapper.sessions.selfhosted.work import RECLAIM_MS
from claude_wrapper.storage.pagination import MAX_LIMIT

_MAX_MS: Final = 24 * 3600 * 1000
_MAX_WORKER: Final = 256


def _environment(call: Call) -> str:
    return call.id("environment_id", "environment", error_code="environment_not_found")


def _place(call: Call) -> tuple[str, str]:
    return _environment(call), call.id("work_id", "work")


async def poll_work(call: Call) -> Response:
    """The next session that needs a worker, or null."""
    require_worker(call.principal)
    query = call.query
    block = query.integer("block_ms", least=1, most=999) or 0
    reclaim = query.integer("reclaim_older_than_ms", least=0, most=_MAX_MS)
    worker = call.request.headers.get("anthropic-worker-id") or None
    if worker is not None and len(worker) > _MAX_WORKER:
        raise InvalidRequest(
            f"has {len(worker)} characters, at most {_MAX_WORKER} are allowed", field="Anthropic-Worker-ID"
        )
    found = await call.deps.work_queue.poll(
        call.principal,
        _environment(call),
        block=block / 1000,
        reclaim_ms=RECLAIM_MS if reclaim is None else reclaim,
        worker=worker,
    )
    return answer(None if found is None else found.to_wire())


async def list_work(call: Call) -> Response:
    """A page of work, for workers."""
    require_worker(call.principal)
    found = await call.deps.work_queue.page(call.principal, _environment(call), call.query.page(most=MAX_LIMIT))
    return page_answer(found)


async def work_stats(call: Call) -> Response:
    """How much work waits, and how many workers poll."""
    return answer(await call.deps.work_queue.stats(call.principal, _environment(call)))


async def get_work(call: Call) -> Response:
    """One work item."""
    return answer((await call.deps.work_queue.get(call.principal, *_place(call))).to_wire())


async def update_work(call: Call) -> Response:
    """Change a work item's metadata."""
    patch = (await call.fields()).only("metadata").object("metadata")
    return answer((await call.deps.work_queue.update(call.principal, *_place(call), patch)).to_wire())


async def ack_work(call: Call) -> Response:
    """A worker takes a work item."""
    require_worker(call.principal)
    return answer((await call.deps.work_queue.ack(call.principal, *_place(call))).to_wire())


async def heartbeat_work(call: Call) -> Response:
    """A worker is still there."""
    require_worker(call.principal)
    beat = await call.deps.work_queue.heartbeat(
        call.principal,
        *_place(call),
        expected=call.query.text("expected_last_heartbeat"),
        desired_ttl=call.query.integer("desired_ttl_seconds", least=0, most=_MAX_MS),
    )
    return answer(beat.to_wire())


async def stop_work(call: Call) -> Response:
    """End a work item: ask its worker to, or at once with `force`."""
    fields = (await call.fields()).only("force")
    force = fields.boolean("force", default=False)
    return answer((await call.deps.work_queue.stop(call.principal, *_place(call), force=force)).to_wire())


_ONE: Final = WORK + "/{work_id}"

ROUTES: Final[tuple[Route, ...]] = (
    get(WORK, list_work),
    get(WORK + "/poll", poll_work),
    get(WORK + "/stats", work_stats),
    get(_ONE, get_work),
    post(_ONE, update_work),
    post(_ONE + "/ack", ack_work),
    post(_ONE + "/heartbeat", heartbeat_work),
    post(_ONE + "/stop", stop_work),
)
