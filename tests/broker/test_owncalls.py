"""What the server asks for a session without a process: guarded, booked and told like a process's calls."""

from __future__ import annotations

import asyncio
import json

import pytest

from broker.world import MODEL, SECRET, World, binding, credential, turn
from claude_wrapper.broker.calls import ANY_MODEL, CredentialKind, Standby
from claude_wrapper.errors import BudgetExceeded, PermissionDenied

pytestmark = pytest.mark.anyio


def question(text: str) -> dict[str, object]:
    return {"model": MODEL, "max_tokens": 100, "messages": [{"role": "user", "content": text}]}


async def test_an_own_call_is_answered_and_booked_for_its_session(world: World) -> None:
    answer = await world.broker.ask(binding(world.upstream.url), turn(), question("[[say hello]]"))
    assert json.loads(answer.body)["content"] == [{"type": "text", "text": "hello"}]
    assert answer.call.error_type is None
    assert answer.call.usage.output_tokens == 1
    [asked] = world.upstream.calls
    assert asked.headers["x-api-key"] == SECRET
    await world.broker.close()  # the books are finished
    [booked] = world.books.recorded
    assert (booked.session, booked.turn, booked.org) == ("sesn_1", "turn_1", "org_1")
    assert world.books.balanced


async def test_a_refused_gate_asks_nobody_and_is_told(world: World) -> None:
    world.books.refuse = BudgetExceeded("the month's budget is spent")
    answer = await world.broker.ask(binding(world.upstream.url), turn(), question("hello"))
    assert (answer.call.status, answer.call.error_type) == (402, "billing_error")
    assert answer.call.attempts == 0
    assert world.upstream.calls == []


async def test_an_upstreams_error_is_told_without_the_secret(world: World) -> None:
    answer = await world.broker.ask(binding(world.upstream.url), turn(), question("[[error 400]]"))
    assert (answer.call.status, answer.call.error_type) == (400, "invalid_request_error")
    assert SECRET.encode() not in answer.body


async def test_an_own_call_that_is_cancelled_is_booked_all_the_same(world: World) -> None:
    asking = asyncio.ensure_future(world.broker.ask(binding(world.upstream.url), turn(), question("[[hang]]")))
    await world.upstream.wait_for(1)
    asking.cancel()
    await asyncio.wait({asking})
    await world.broker.close()  # the books are finished
    assert [call.status for call in world.books.recorded] == [499]
    assert world.books.balanced


async def test_nothing_but_the_clis_requests_is_made_with_an_oauth_credential(world: World) -> None:
    theirs = binding(world.upstream.url, kind=CredentialKind.OAUTH)
    with pytest.raises(PermissionDenied, match="OAuth"):
        await world.broker.ask(theirs, turn(), question("hello"))
    assert world.upstream.calls == []


async def test_an_oauth_credential_does_not_stand_in_for_an_own_call(world: World) -> None:
    other = credential(world.upstream.url, id="cred_2", kind=CredentialKind.OAUTH, secret="sk-ant-oat-other")
    standby = Standby(models={ANY_MODEL: ()}, credentials=(other,))
    answer = await world.broker.ask(binding(world.upstream.url, standby=standby), turn(), question("[[error 401]]"))
    assert answer.call.status == 401
    assert len(world.upstream.calls) == 1
