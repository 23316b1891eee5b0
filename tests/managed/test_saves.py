"""When files are saved and when a save is given up, on virtual time: the keeper and a conversation, without processes."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from claude_wrapper.agent.launch import AGENT
from claude_wrapper.errors import StorageUnavailable
from claude_wrapper.sessions.conversation import Conversation
from claude_wrapper.sessions.journal import SessionJournal
from claude_wrapper.sessions.keeping import KeepingSettings, SnapshotKeeper
from claude_wrapper.sessions.rooms import Rooms
from claude_wrapper.sessions.snapshots import Position, Snapshot
from claude_wrapper.sessions.spec import Owner, TurnEnd, TurnInput
from claude_wrapper.testing.clock import ManualClock, SequentialIds

pytestmark = pytest.mark.anyio

SETTINGS = KeepingSettings()
MESSAGES = 4


class Store:
    """A snapshot store whose saves last until the test lets them go."""

    def __init__(self) -> None:
        self.began: list[Position] = []
        self.saved: list[Position] = []
        self.go = asyncio.Event()
        self.go.set()

    async def save(self, org: str, session: str, *_dirs: Path, position: Position, guard: Any, **_: Any) -> Snapshot:
        self.began.append(position)
        await self.go.wait()
        self.saved.append(position)
        return Snapshot("snap_one", session, ManualClock().now(), 1, 1, 1, 1, 1, "", "", position=position)


class Database:
    """Says how far the conversation is."""

    answered = True

    async def query(self, _read: Any) -> tuple[int, bool]:
        return MESSAGES, self.answered


class FailingJournal(SessionJournal):
    """A journal whose database is away when a turn begins or ends."""

    def __init__(self, fails: str) -> None:
        self.fence, self.fails = 1, fails

    async def begin(self, turn_input: TurnInput) -> TurnInput:
        if self.fails == "begin":
            raise StorageUnavailable("away")
        return turn_input

    async def end(self, end: TurnEnd) -> None:
        del end
        if self.fails == "end":
            raise StorageUnavailable("away")


@dataclass
class World:
    clock: ManualClock = field(default_factory=ManualClock)
    store: Store = field(default_factory=Store)
    database: Database = field(default_factory=Database)
    keeper: SnapshotKeeper = field(init=False)
    conversation: Conversation = field(init=False)

    def __post_init__(self) -> None:
        books: Any = SimpleNamespace(db=self.database, clock=self.clock, ids=SequentialIds())
        store: Any = self.store
        self.keeper = SnapshotKeeper(books, store, Path("kept"), cli_version=lambda: "2.1.327", settings=SETTINGS)
        nothing: Any = None
        rooms = Rooms(
            nothing, self.clock, SequentialIds(), nothing, asyncio.get_running_loop().create_task, keeper=self.keeper
        )
        self.conversation = Conversation(
            "sesn_one", Owner("org_one", "key_one"), rooms, held=True, on_settled=lambda _: None
        )
        self.conversation.journal = FailingJournal("")
        process: Any = SimpleNamespace(
            profile=AGENT,
            dirs=SimpleNamespace(home=Path("home"), work=Path("work")),
            agent=SimpleNamespace(said="line", session_uuid=""),
        )
        self.conversation.process = process

    async def settle(self) -> None:
        await self.clock.advance(0)
        await asyncio.wait_for(asyncio.to_thread(lambda: None), 5)  # the CLI's version is asked in a thread
        await self.clock.advance(0)

    async def began(self, count: int) -> None:
        async with asyncio.timeout(5):
            while len(self.store.began) < count:
                await self.settle()


@pytest.fixture
async def world() -> World:
    return World()


async def test_a_client_that_answers_at_once_costs_no_save(world: World) -> None:
    for _ in range(3):
        world.keeper.waits(world.conversation, quiet=True)
        await world.clock.advance(SETTINGS.waiting_seconds / 2)
        world.keeper.goes_on(world.conversation)
        await world.clock.advance(SETTINGS.waiting_seconds * 2)
    await world.settle()
    assert world.store.began == []
    assert world.keeper.behind == 0


async def test_a_turn_that_waits_is_saved_and_never_resumed_from(world: World) -> None:
    world.keeper.waits(world.conversation, quiet=True)
    await world.clock.advance(SETTINGS.waiting_seconds)
    await world.began(1)
    await world.settle()
    assert world.store.saved == [Position(MESSAGES, exact=False)]
    assert world.keeper.behind == 0


@pytest.mark.parametrize("answered", [True, False])
async def test_files_of_tools_that_still_run_are_those_before_the_message_that_called_them(
    world: World, *, answered: bool
) -> None:
    world.database.answered = answered  # False: some results are there already
    world.keeper.waits(world.conversation, quiet=False)
    await world.clock.advance(SETTINGS.waiting_seconds)
    await world.settle()
    assert world.store.began == []
    await world.clock.advance(SETTINGS.working_seconds - SETTINGS.waiting_seconds)
    await world.began(1)
    assert world.store.began == [Position(MESSAGES - (1 if answered else 2), exact=False)]


async def test_tools_that_end_beside_the_wait_make_room_for_a_save_that_has_seen_them(world: World) -> None:
    world.store.go.clear()
    world.keeper.waits(world.conversation, quiet=False)
    await world.clock.advance(SETTINGS.working_seconds)
    await world.began(1)
    world.keeper.waits(world.conversation, quiet=True)
    world.store.go.set()
    await world.clock.advance(SETTINGS.waiting_seconds)
    await world.began(2)
    await world.settle()
    assert world.store.saved == [Position(MESSAGES, exact=False)]


async def test_a_turn_that_goes_on_gives_its_save_up_and_its_end_saves_again(world: World) -> None:
    world.store.go.clear()
    world.keeper.waits(world.conversation, quiet=True)
    await world.clock.advance(SETTINGS.waiting_seconds)
    await world.began(1)
    world.keeper.goes_on(world.conversation)
    await world.settle()
    world.store.go.set()
    await world.settle()
    assert world.store.saved == []
    world.keeper.ended(world.conversation)
    await world.began(2)
    await world.settle()
    assert len(world.store.saved) == 1


@pytest.mark.parametrize("fails", ["begin", "end"])
async def test_a_save_that_a_turn_gave_up_is_taken_up_again_when_the_journal_fails(
    world: World, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.store.go.clear()
    world.keeper.ended(world.conversation)
    await world.began(1)
    world.conversation.journal = FailingJournal(fails)

    async def on_process(*_: Any) -> bool:
        return True

    monkeypatch.setattr(world.conversation, "_on_process", on_process)
    turn_input: Any = None
    leg: Any = None
    with pytest.raises(StorageUnavailable):
        await world.conversation._turn(turn_input, leg)
    world.store.go.set()
    await world.began(2)
    await world.settle()
    assert len(world.store.saved) == 1, "the first was given up, the second is the one that is owed"
    assert world.keeper.behind == 0
