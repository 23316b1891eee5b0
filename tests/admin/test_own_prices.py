"""The operator's prices for one organisation: set over HTTP, in force for its next call, nobody else's business."""

from __future__ import annotations

import pytest
from admin_world import Admin

from claude_wrapper.wire.usage import Usage

pytestmark = pytest.mark.anyio

CHEAP = {"input": 10, "output": 20, "cache_read": 1, "cache_write_5m": 12, "cache_write_1h": 20}
OWN = {"model": "claude-sonnet-5-5", "effective_from": "2026-01-01T00:00:00Z", "price": CHEAP}


async def test_an_organisations_price_is_the_operators_to_set_and_holds_for_it_alone(admin: Admin) -> None:
    inside = admin.as_operator(admin.ours)
    prices = admin.server.server.app.state.deps.tenants.prices
    refused = await admin.post("/prices", OWN)
    assert refused.status == 403
    made = await admin.post("/prices", OWN, **inside)
    assert made.status == 200, made.raw
    assert made.body["price"] == {**CHEAP, "web_search": 0}
    assert [one["model"] for one in (await admin.get("/prices")).body["data"]] == ["claude-sonnet-5-5"]
    assert (await admin.get("/prices", key=admin.their_owner)).body["data"] == []

    used, now = Usage(output_tokens=1_000_000), admin.server.server.app.state.deps.clock.now()
    assert await prices.micros(admin.ours, "claude-sonnet-5-5", used, now) == 20
    assert await prices.micros(admin.theirs, "claude-sonnet-5-5", used, now) == 10_000_000

    log = (await admin.get("/audit_log")).body["data"]
    assert ("price.set", "claude-sonnet-5-5") in {(one["action"], one["target"]["id"]) for one in log}
    gone = "/prices?model=claude-sonnet-5-5&effective_from=2026-01-01T00:00:00Z"
    assert (await admin.delete(gone)).status == 403
    assert (await admin.delete(gone, **inside)).status == 200
    assert (await admin.delete(gone, **inside)).status == 404
    assert (await admin.get("/prices")).body["data"] == []
    assert await prices.micros(admin.ours, "claude-sonnet-5-5", used, now) == 10_000_000


async def test_a_price_that_is_none_names_its_field(admin: Admin) -> None:
    wrong = await admin.post("/prices", OWN | {"price": CHEAP | {"output": -1}}, **admin.as_operator())
    assert (wrong.status, wrong.body["error"]["param"]) == (400, "price.output")
    assert (await admin.post("/prices", OWN | {"model": ""}, **admin.as_operator())).body["error"]["param"] == "model"
    assert (await admin.delete("/prices?model=x", **admin.as_operator())).body["error"]["param"] == "effective_from"
