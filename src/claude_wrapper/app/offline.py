"""Administration without a running server: the database of the settings, opened for one command.

It works beside a running server too: on Postgres and on SQLite (whose writers take turns). With Redis the server hears of
a change at once, without it within the half minute that it keeps what it has read.
"""

from __future__ import annotations

import base64
import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from claude_wrapper.app.tenants import MASTER_KEY_FILE, database_url_of, master_key_of, pepper_of
from claude_wrapper.clock import SystemClock
from claude_wrapper.config import Settings
from claude_wrapper.errors import ConfigurationError
from claude_wrapper.ids import RandomIds
from claude_wrapper.storage import migrations
from claude_wrapper.storage.announcer import Announcer
from claude_wrapper.storage.engine import Database
from claude_wrapper.storage.state.redis import RedisState
from claude_wrapper.tenancy.audit import Origin, Scribe
from claude_wrapper.tenancy.keyformat import Pepper
from claude_wrapper.tenancy.principal import Principal, operator
from claude_wrapper.vault.credentials import Rules
from claude_wrapper.vault.keys import MasterKey, create_key_file, read_key_file
from claude_wrapper.vault.kinds import UrlPolicy
from claude_wrapper.vault.orgkeys import OrgKeys, unseal
from claude_wrapper.vault.rotation import Rotation, rotate_master


@dataclass(frozen=True, slots=True)
class Offline:
    """What a command works with; it acts as the operator."""

    settings: Settings
    database: Database
    scribe: Scribe
    master: MasterKey
    org_keys: OrgKeys
    pepper: Pepper
    rules: Rules
    operator: Principal


def data_dir_of(settings: Settings) -> Path:
    """The data directory, made if it is not there."""
    path = settings.data_dir.expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o711)  # as the server does: processes with their own uid pass through
    except OSError as error:
        raise ConfigurationError(f"{path}: the data directory cannot be used: {error.strerror}") from error
    return path


@contextlib.asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[Offline]:
    """Raises ConfigurationError, StorageUnavailable or VaultSealed, with the reason, before anything is changed."""
    clock, data_dir = SystemClock(), data_dir_of(settings)
    async with contextlib.AsyncExitStack() as stack:
        database = Database(database_url_of(settings, data_dir), clock=clock)
        stack.push_async_callback(database.close)
        await migrations.prepare(database)
        master = master_key_of(settings, data_dir)
        await unseal(database, master, clock)
        if settings.redis_url:
            state = RedisState(settings.redis_url, prefix="cw:")
            stack.push_async_callback(state.close)
            announcer = Announcer(state, clock)
            announcer.start()
            stack.push_async_callback(announcer.close)
            database.listener = announcer
        yield Offline(
            settings=settings,
            database=database,
            scribe=Scribe(clock, RandomIds(), Origin(user_agent="claude-wrapper admin")),
            master=master,
            org_keys=OrgKeys(database, master, clock),
            pepper=Pepper(pepper_of(settings, data_dir)),
            rules=Rules(
                allow_oauth=settings.allow_oauth,
                urls=UrlPolicy(allow_http=settings.upstream_private, allow_private=settings.upstream_private),
            ),
            operator=operator(),
        )


async def migrate(settings: Settings) -> tuple[str | None, str | None]:
    """Bring the database to this version's schema; the revision before and after."""
    database = Database(database_url_of(settings, data_dir_of(settings)))
    try:
        return await migrations.migrate(database)
    finally:
        await database.close()


def add_master_key(settings: Settings) -> str:
    """Put a new key first into the key file, the old ones beside it; its id. Raises ConfigurationError."""
    if settings.kms_client:
        raise ConfigurationError(
            "the master key is in a KMS: make the new one there, and put its name first in KMS_KEYS"
        )
    if settings.master_key:
        raise ConfigurationError(
            "the master key comes from CLAUDE_WRAPPER_MASTER_KEY: put a new one before it there, separated by a comma"
        )
    path = data_dir_of(settings) / MASTER_KEY_FILE
    old = read_key_file(path)
    new = path.with_name(path.name + ".new")
    with contextlib.suppress(FileNotFoundError):
        new.unlink()  # left by a command that was interrupted; nothing was ever wrapped with it
    key = create_key_file(new)
    _replace(path, new, [key.material, *(one.material for one in old)])
    return key.id


async def rotate(settings: Settings) -> Rotation:
    """Wrap everything with the first master key. Raises VaultSealed when an old one is missing."""
    async with opened(settings) as offline:
        return await rotate_master(offline.database, offline.operator, offline.master, offline.scribe.clock)


def _replace(path: Path, new: Path, keys: list[bytes]) -> None:
    with new.open("w", encoding="ascii") as file:
        file.write("".join(base64.b64encode(key).decode() + "\n" for key in keys))
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
