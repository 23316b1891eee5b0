"""The Admin API beyond the SDK's calls: secrets shown once, idempotent creates, versions, audit, the operator's part."""

from __future__ import annotations

import asyncio
import csv
import io
from datetime import UTC, datetime, timedelta

import pytest
from admin_world import Admin

from databases import scalar

pytestmark = pytest.mark.anyio


async def test_a_key_is_shown_once_works_and_is_rotated_with_overlap(admin: Admin) -> None:
    made = await admin.post("/api_keys", {"name": "prod", "role": "viewer"})
    secret, key_id = made.body["secret"], made.body["id"]
    assert "secret" not in (await admin.get(f"/api_keys/{key_id}")).body
    assert (await admin.get("/me", key=secret)).body["id"] == admin.ours
    rotated = await admin.post(f"/api_keys/{key_id}/rotate", {"overlap_seconds": 3600})
    assert rotated.body["replaces"] == key_id
    assert (await admin.get("/me", key=secret)).status == 200
    assert (await admin.get("/me", key=rotated.body["secret"])).status == 200
    await admin.post(f"/api_keys/{key_id}", {"status": "archived"})
    refused = await admin.get("/me", key=secret)
    assert (refused.status, refused.error) == (401, "this API key was revoked")


@pytest.mark.parametrize(
    ("change", "says"),
    [({"status": "inactive"}, "inactive"), ({"status": "archived"}, "revoked")],
)
async def test_a_key_that_is_switched_off_is_refused_at_once(admin: Admin, change: dict[str, str], says: str) -> None:
    made = (await admin.post("/api_keys", {"name": "x"})).body
    assert (await admin.get("/me", key=made["secret"])).status == 200
    await admin.post(f"/api_keys/{made['id']}", change)
    refused = await admin.get("/me", key=made["secret"])
    assert refused.status == 401
    assert says in refused.error


async def test_an_expired_key_is_refused_and_told_why(admin: Admin) -> None:
    soon = datetime.now(UTC) + timedelta(milliseconds=300)
    made = (await admin.post("/api_keys", {"name": "x", "expires_at": soon.isoformat()})).body
    while (answer := await admin.get("/me", key=made["secret"])).status == 200:  # bounded by the test's time-out
        await asyncio.sleep(0.05)
    assert (answer.status, answer.error) == (401, "this API key has expired")
    past = await admin.post("/api_keys", {"name": "x", "expires_at": "2020-01-01T00:00:00Z"})
    assert past.error == "expires_at: must be in the future"


async def test_an_administrator_names_partners_by_id_without_learning_whether_they_exist(admin: Admin) -> None:
    answers = []
    for one in (admin.theirs, "org_0123456789abcdefghjkmnpqrs"):
        made = await admin.post("/policies", {"cache_share_with": [one]})
        assert (made.status, made.body["cache_share_with"]) == (200, [one])
        answers.append({**made.body, "cache_share_with": None})
    assert answers[0] == answers[1]
    # What we name changes nothing that they see, and their policies stay closed to us.
    assert (await admin.get("/policies", key=admin.their_owner)).body["cache_share_with"] == []
    refused = await admin.post("/policies", {"cache_share_with": [admin.ours]})
    assert (refused.status, refused.error) == (400, "cache_share_with: an organisation does not name itself")
    too_many = await admin.post("/policies", {"cache_share_with": [f"org_{number}" for number in range(9)]})
    assert (too_many.status, too_many.body["error"]["param"]) == (400, "cache_share_with")
    for role in ("developer", "viewer", "billing"):
        denied = await admin.post("/policies", {"cache_share_with": [admin.theirs]}, key=await admin.key(role))
        assert denied.status == 403
    assert (await admin.post("/policies", {"cache_share_with": None})).body["cache_share_with"] == []


async def test_a_create_that_is_sent_twice_happens_once_and_its_secret_is_kept_sealed(admin: Admin) -> None:
    again = {"idempotency-key": "create-prod-1"}
    answers = await asyncio.gather(*(admin.post("/api_keys", {"name": "prod"}, headers=again) for _ in range(4)))
    assert {answer.status for answer in answers} == {200}
    assert len({answer.body["secret"] for answer in answers}) == 1
    assert len((await admin.get("/api_keys")).body["data"]) == 2
    other = await admin.post("/api_keys", {"name": "another"}, headers=again)
    assert (other.status, other.body["error"]["param"]) == (400, "idempotency-key")
    theirs = await admin.post("/api_keys", {"name": "prod"}, headers=again, key=admin.their_owner)
    assert theirs.body["secret"] != answers[0].body["secret"]
    database = admin.server.server.app.state.deps.tenants.database
    kept = await scalar(database, "SELECT response FROM idempotency_keys WHERE org_id = :org", org=admin.ours)
    assert answers[0].body["secret"].encode() not in bytes(kept)


async def test_of_two_admins_who_edit_at_once_the_slower_is_told(admin: Admin) -> None:
    made = (await admin.post("/workspaces", {"name": "Lab"})).body
    first, second = await asyncio.gather(
        *(admin.post(f"/workspaces/{made['id']}", {"name": name, "version": made["version"]}) for name in "ab")
    )
    assert sorted([first.status, second.status]) == [200, 409]
    loser = first if first.status == 409 else second
    assert loser.headers["x-should-retry"] == "false"
    budget = (await admin.post("/budgets", {"scope": "organization", "cap_micros": 5})).body
    await admin.post(f"/budgets/{budget['id']}", {"cap_micros": 6, "version": budget["version"]})
    assert (await admin.post(f"/budgets/{budget['id']}", {"cap_micros": 7, "version": budget["version"]})).status == 409
    path = f"/limits/workspace/{made['id']}"
    assert (await admin.post(path, {"limits": {"requests": 5}, "version": 0})).status == 200
    assert (await admin.post(path, {"limits": {"requests": 6}, "version": 0})).status == 409


async def test_every_change_is_in_the_audit_log_with_its_author_and_origin(admin: Admin) -> None:
    space = (await admin.post("/workspaces", {"name": "Lab"})).body["id"]
    changed = await admin.post(f"/workspaces/{space}", {"name": "Works"}, headers={"user-agent": "test/1"})
    await admin.post(f"/limits/workspace/{space}", {"limits": {"requests": 5}})
    budget = (await admin.post("/budgets", {"scope": "workspace", "subject_id": space, "cap_micros": 9})).body["id"]
    await admin.delete(f"/budgets/{budget}")
    entries = (await admin.get("/audit_log?limit=5")).body["data"]
    actions = [entry["action"] for entry in reversed(entries)]
    assert actions == ["workspace.create", "workspace.update", "limits.update", "budget.create", "budget.delete"]
    update = entries[3]
    assert (update["before"], update["after"]) == ({"name": "Lab"}, {"name": "Works"})
    assert (update["actor"]["type"], update["target"]["id"], update["address"]) == ("api_key", space, "127.0.0.1")
    assert (update["user_agent"], update["request_id"]) == ("test/1", changed.headers["request-id"])
    assert (await admin.get(f"/audit_log?action=budget.create&target_id={budget}")).body["data"][0]["after"][
        "cap_micros"
    ] == 9


async def test_nobody_hands_on_more_than_they_hold(admin: Admin) -> None:
    developer = await admin.key("developer", allowed_models=["claude-haiku-*"])
    for body in (
        {"role": "owner"},
        {"role": "developer", "allowed_models": ["claude-opus-5-5"]},
        {"allowed_models": ["*"]},
    ):
        refused = await admin.post("/api_keys", {"name": "x", **body}, key=developer)
        assert refused.status == 403, body
    inherited = await admin.post("/api_keys", {"name": "x"}, key=developer)
    assert inherited.body["allowed_models"] == ["claude-haiku-*"]
    ann = (await admin.post("/users", {"email": "ann@example.com", "role": "admin"})).body["id"]
    assert (await admin.post("/api_keys", {"name": "x", "user_id": ann}, key=developer)).status == 403
    lifted = await admin.post(f"/api_keys/{inherited.body['id']}", {"limits": {"requests": "unlimited"}}, key=developer)
    assert lifted.body["error"]["details"]["scope"] == "write:limits"


async def test_an_organisation_does_not_lift_its_own_limits(admin: Admin) -> None:
    path = f"/limits/organization/{admin.ours}"
    assert (await admin.post(path, {"limits": {"requests": "unlimited"}})).status == 403
    assert (await admin.post(path, {"limits": {"requests": "100/hour"}}, **admin.as_operator(admin.ours))).status == 200
    assert (await admin.get(path)).body["limits"] == {"requests": "100/hour"}
    assert (await admin.post(f"/limits/organization/{admin.theirs}", {"limits": {}})).status == 404
    made = (await admin.post("/api_keys", {"name": "x", "limits": {"requests": "5/minute", "sessions": 2}})).body
    assert made["limits"] == {"requests": "5/minute", "sessions": 2}
    wrong = await admin.post("/api_keys", {"name": "x", "limits": {"speed": 3}})
    assert (wrong.status, wrong.body["error"]["param"]) == (400, "limits.speed")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/api_keys", {}, "name"),
        ("/api_keys", {"name": 5}, "name"),
        ("/api_keys", {"name": "x", "colour": "red"}, "colour"),
        ("/api_keys", {"name": "x", "expires_at": "tomorrow"}, "expires_at"),
        ("/api_keys", {"name": "x", "role": "king"}, "role"),
        ("/workspaces", {"name": "x", "external_key_id": "k"}, "external_key_id"),
        ("/budgets", {"scope": "planet", "cap_micros": 1}, "scope"),
        ("/budgets", {"scope": "organization", "cap_micros": -1}, "cap_micros"),
        ("/spend_limits", {"amount": "-5", "scope": {"type": "organization"}}, "amount"),
        ("/credentials", {"kind": "api_key", "name": "x", "secret": {"password": "p"}}, "secret.password"),
        ("/credentials", {"kind": "bedrock", "name": "x", "secret": {"api_key": "p"}}, "config.region"),
        ("/invites", {"email": "nobody", "role": "viewer"}, "email"),
    ],
)
async def test_bad_input_names_the_field(admin: Admin, path: str, body: dict[str, object], param: str) -> None:
    answer = await admin.post(path, body)
    assert (answer.status, answer.body["error"]["param"]) == (400, param), answer.body


@pytest.mark.parametrize("body", [b"{", b"[]", b"null", b'"x"', b"\xff", b"[" * 5000])
async def test_a_body_that_is_no_object_is_refused(admin: Admin, body: bytes) -> None:
    assert (await admin.post("/workspaces", body)).status == 400


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=x", "limit=5000", "page=page_x", "after_id=apikey_x", "status=lost"]
)
async def test_a_bad_query_is_refused(admin: Admin, query: str) -> None:
    assert (await admin.get(f"/api_keys?{query}")).status == 400


async def test_a_credential_is_kept_tried_changed_and_never_shown(admin: Admin) -> None:
    upstream = admin.server.upstream
    upstream.api_keys = {"sk-ant-good-0123456789"}
    body = {"kind": "custom", "name": "gate", "base_url": upstream.url, "secret": {"api_key": "sk-ant-good-0123456789"}}
    made = await admin.post("/credentials", body)
    assert (made.status, made.body["hint"], made.body["status"]) == (200, "6789", "active")
    path = f"/credentials/{made.body['id']}"
    assert (await admin.post(f"{path}/test")).body["validity"] == "valid"
    moved = await admin.post(path, {"base_url": "https://elsewhere.example.com"})
    assert (moved.status, moved.body["error"]["param"]) == (400, "base_url")
    changed = await admin.post(path, {"secret": {"api_key": "sk-ant-bad-0123456789ab"}, "version": 1})
    assert changed.body["version"] == 2
    tried = (await admin.post(f"{path}/test")).body
    assert (tried["validity"], tried["status"]) == ("invalid", 401)
    assert b"sk-ant" not in (await admin.get("/credentials")).raw + (await admin.get("/audit_log")).raw
    assert (await admin.delete(path)).body["type"] == "credential_deleted"
    assert (await admin.post(f"{path}/test")).status == 404


async def test_the_operator_creates_closes_opens_and_erases_an_organisation(admin: Admin) -> None:
    made = (await admin.post("", {"name": "Acme"}, **admin.as_operator())).body
    inside = admin.as_operator(made["id"])
    key = (await admin.post("/api_keys", {"name": "x", "role": "owner"}, **inside)).body["secret"]
    await admin.post("/credentials", {"kind": "api_key", "name": "x", "secret": {"api_key": "sk-ant-x"}}, key=key)
    assert (await admin.get("/me", key=key)).body["name"] == "Acme"
    names = [one["name"] for one in (await admin.get("?limit=2", **admin.as_operator())).body["data"]]
    assert names[0] == "Acme"
    assert (await admin.post(f"/{made['id']}/purge", **admin.as_operator())).status == 409
    assert (await admin.delete(f"/{made['id']}", key=key)).body["deleted_at"] is not None
    gone = await admin.get("/me", key=key)
    assert (gone.status, gone.error) == (401, "the organisation of this API key was deleted")
    assert (await admin.post(f"/{made['id']}/restore", **admin.as_operator())).status == 200
    assert (await admin.get("/me", key=key)).status == 200
    await admin.delete(f"/{made['id']}", **admin.as_operator())
    purged = await admin.post(f"/{made['id']}/purge", **admin.as_operator())
    assert purged.status == 200, purged.body
    assert purged.body["erased"]["vault"] >= 2
    assert purged.body["erased"]["api_keys"] == 1
    assert "audit_log" in purged.body["kept"]
    assert (await admin.get("/me", key=key)).status == 401
    assert (await admin.get(f"/{made['id']}", **admin.as_operator())).status == 404


async def test_nobody_but_the_operator_names_another_organisation(admin: Admin) -> None:
    foreign = {"cw-organization": admin.theirs}
    assert (await admin.get("/me", headers=foreign)).status == 404
    assert (await admin.get("/me", headers={"cw-organization": admin.ours})).status == 200
    assert (await admin.get("/me", **admin.as_operator("org_unknown"))).status == 404


async def test_the_ledger_is_exported_in_three_forms(admin: Admin) -> None:
    path = "/usage/export?starting_at=2026-01-01"
    assert (await admin.get(path)).body == {"data": [], "has_more": False, "next_page": None}
    as_csv = await admin.get(f"{path}&format=csv")
    assert as_csv.headers["content-type"].startswith("text/csv")
    assert list(csv.reader(io.StringIO(as_csv.raw.decode()))) == []
    as_parquet = await admin.get(f"{path}&format=parquet")
    assert (as_parquet.raw[:4], as_parquet.raw[-4:]) == (b"PAR1", b"PAR1")
    assert (await admin.get(f"{path}&format=xml")).status == 400


async def test_the_document_describes_every_admin_route_with_its_scope(admin: Admin) -> None:
    async with admin.server.http.get("/openapi.json") as response:
        document = await response.json()
    keys = document["paths"]["/v1/organizations/api_keys"]
    assert keys["post"]["x-scope"] == "write:api_keys"
    schema = keys["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    assert schema.rpartition("/")[2] in document["components"]["schemas"]
