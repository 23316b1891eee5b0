"""Another model or credential answers when the first one cannot: which, when, and what the books say of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.world import MODEL, SECRET, Process, World, binding, credential, request_body, turn
from claude_wrapper.broker import BrokerSettings, Credential, CredentialKind
from claude_wrapper.broker.calls import Standby
from claude_wrapper.broker.fallback import Candidate, Fault, fault_of, following
from claude_wrapper.errors import BudgetExceeded
from claude_wrapper.vault.resolve import OPERATOR_CREDENTIAL

# The decision ---------------------------------------------------------------------------------------------------------

_CREDENTIALS = st.builds(
    Credential,
    id=st.sampled_from(["cred_a", "cred_b", "cred_c", OPERATOR_CREDENTIAL]),
    kind=st.sampled_from(CredentialKind),
    secret=st.just("s"),
    base_url=st.just("http://u"),
)
_MODELS = st.sampled_from(["m1", "m2", "m3", "m4"])


@given(
    first=st.builds(Candidate, _MODELS, _CREDENTIALS),
    standby=st.builds(
        Standby,
        models=st.dictionaries(st.one_of(_MODELS, st.just("*")), st.lists(_MODELS, max_size=3).map(tuple), max_size=3),
        credentials=st.lists(_CREDENTIALS, max_size=3).map(tuple),
    ),
    faults=st.lists(st.sampled_from(Fault), min_size=1, max_size=12),
    allowed=st.none() | st.frozensets(_MODELS),
    other_models=st.booleans(),
)
def test_the_search_ends_asks_nobody_twice_and_never_leaves_the_organisations_own(
    first: Candidate, standby: Standby, faults: list[Fault], allowed: frozenset[str] | None, other_models: bool
) -> None:
    trail = [(first, faults[0])]
    own = {first.credential.id, *(one.id for one in standby.credentials)}
    while (one := following(trail, standby, allowed_models=allowed, other_models=other_models)) is not None:
        assert trail[-1][1] is not Fault.REQUEST
        assert (one.model, one.credential.id) not in {(asked.model, asked.credential.id) for asked, _ in trail}
        assert one.credential.id in own
        assert one.credential.kind is first.credential.kind is CredentialKind.API_KEY
        if one.credential.id != first.credential.id:
            assert OPERATOR_CREDENTIAL not in (one.credential.id, first.credential.id)
        assert one.model == first.model or allowed is None or one.model in allowed
        assert one.model == first.model or (other_models and one.model in standby.models_after(first.model))
        trail.append((one, faults[len(trail) % len(faults)]))
        assert len(trail) <= 1 + len(standby.models_after(first.model)) + len(standby.credentials)


@pytest.mark.parametrize(
    ("statuses", "fault"),
    [((400, 404, 413), "request"), ((401, 402, 403, 429), "credential"), ((500, 502, 504, 529), "model")],
)
def test_a_status_blames_the_request_the_credential_or_the_model(statuses: tuple[int, ...], fault: str) -> None:
    assert {fault_of(status) for status in statuses} == {fault}


# Through the broker ---------------------------------------------------------------------------------------------------

OTHER = "claude-haiku-4-5"
SECOND_SECRET = "sk-ant-second-secret"


async def _process(world: World, standby: Standby, **changes: object) -> Process:
    process = await world.process(bound=False)
    bound = binding(world.upstream.url)
    own = dataclasses.replace(bound.credential, standby=standby, **changes)  # type: ignore[arg-type]
    process.endpoint.bind(dataclasses.replace(bound, credential=own))
    process.endpoint.begin(turn())
    return process


pytestmark = pytest.mark.anyio


async def _ask(process: Process, text: str) -> tuple[int, str]:
    async with process.post(request_body(text)) as answer:
        return answer.status, await answer.text()


async def test_another_model_answers_for_an_overloaded_one_and_is_booked_as_who_answered(world: World) -> None:
    world.upstream.fail_models[MODEL] = 529
    process = await _process(world, Standby(models={"*": (OTHER,)}))
    turn_context = process.endpoint._turn
    status, text = await _ask(process, "[[say hi]]")
    assert status == 200
    assert f'"model":"{OTHER}"' in text.replace(" ", "")
    (call,) = await process.endpoint.end()
    assert (call.model, call.asked_model, call.status, call.attempts) == (OTHER, MODEL, 200, 5)
    assert turn_context is not None
    assert turn_context.notes == {"cw-fallback-model": OTHER}
    assert world.books.reserved == [MODEL, OTHER]
    assert [one.model for one in world.books.settled] == [OTHER]
    assert world.books.balanced
    assert [one.model for one in world.books.recorded] == [OTHER]


async def test_an_open_breaker_of_one_model_does_not_shut_out_the_one_that_stands_in(tmp_path: Path) -> None:
    settings = BrokerSettings(retry_attempts=1, breaker_failures=2, retry_base_seconds=0.001, finish_seconds=1.0)
    async with World(tmp_path, settings) as world:
        world.upstream.fail_models[MODEL] = 529
        process = await _process(world, Standby(models={MODEL: (OTHER,)}))
        for _ in range(4):
            assert (await _ask(process, "[[say hi]]"))[0] == 200
        asked = [one.body["model"] for one in world.upstream.requests]
        assert asked == [MODEL, OTHER] * 2 + [OTHER] * 2
        world.broker.refuse_while_shut(process.endpoint.binding.credential)  # type: ignore[union-attr]
        world.upstream.fail_models[OTHER] = 500
        status, text = await _ask(process, "[[say hi]]")
        assert status == 503, text


async def test_a_refused_credential_is_replaced_at_once_and_no_secret_shows(world: World) -> None:
    world.upstream.api_keys = {SECOND_SECRET}
    second = credential(world.upstream.url, id="cred_2", secret=SECOND_SECRET)
    process = await _process(world, Standby(credentials=(second,)))
    status, text = await _ask(process, "[[say hi]]")
    assert status == 200
    assert [one.headers["x-api-key"] for one in world.upstream.requests] == [SECRET, SECOND_SECRET]
    (call,) = await process.endpoint.end()
    assert (call.credential_id, call.model, call.asked_model) == ("cred_2", MODEL, None)
    assert world.books.reserved == [MODEL]
    assert world.books.balanced
    assert SECRET not in text
    assert SECOND_SECRET not in text


@pytest.mark.parametrize("first", ["tenant", "operator"])
async def test_a_tenant_is_never_served_with_the_operators_key_nor_the_other_way_round(
    world: World, first: str
) -> None:
    world.upstream.api_keys = {SECOND_SECRET}
    ids = ("cred_1", OPERATOR_CREDENTIAL) if first == "tenant" else (OPERATOR_CREDENTIAL, "cred_1")
    second = credential(world.upstream.url, id=ids[1], secret=SECOND_SECRET)
    process = await _process(world, Standby(credentials=(second,)), id=ids[0])
    status, _ = await _ask(process, "[[say hi]]")
    assert status == 401
    assert [one.headers["x-api-key"] for one in world.upstream.requests] == [SECRET]


async def test_a_model_that_the_budget_refuses_does_not_stand_in_and_the_first_failure_is_told(world: World) -> None:
    world.upstream.fail_models[MODEL] = 529
    process = await _process(world, Standby(models={MODEL: (OTHER,)}))

    async def refuse_the_second(point: str) -> None:
        if point == "reserve" and world.books.reserved:
            world.books.refuse = BudgetExceeded("no money for that model")

    world.books.pause = refuse_the_second
    status, _ = await _ask(process, "[[say hi]]")
    (call,) = await process.endpoint.end()
    assert (status, call.status, call.model) == (529, 529, MODEL)
    assert world.books.balanced
    assert {one.body["model"] for one in world.upstream.requests} == {MODEL}


async def test_all_credentials_of_an_upstream_share_a_bound_on_retries(tmp_path: Path) -> None:
    settings = BrokerSettings(
        retry_attempts=2,
        retry_base_seconds=0.001,
        retry_budget_ratio=0.0,
        retry_budget_reserve=2,
        upstream_retry_reserve=3,
        breaker_failures=1000,
        finish_seconds=1.0,
    )
    async with World(tmp_path, settings) as world:
        attempts = []
        for number in range(4):
            process = await world.process(id=f"cred_{number}")
            before = world.upstream.count
            assert (await _ask(process, "[[error 500]]"))[0] == 500
            assert (await _ask(process, "[[error 500]]"))[0] == 500
            attempts.append(world.upstream.count - before)
        # Two retries are the first credential's own bound, one is what is then left of the upstream's three.
        assert attempts == [4, 3, 2, 2]
        assert world.noted.spent == [500] * 5
