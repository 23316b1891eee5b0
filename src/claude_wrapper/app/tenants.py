"""Everything about tenants, running: database, keys, vault, limits and ledger.

Started before anything serves, in this order: database (migrated or checked), vault (unsealed), operator, caches that
hear of changes, limits, ledger. Stopped in reverse; the ledger writes its last rows before the database closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import aiohttp
import structlog

from claude_wrapper.app.caching import Caches
from claude_wrapper.clock import Clock
from claude_wrapper.config import Settings
from claude_wrapper.errors import ConfigurationError, StorageUnavailable
from claude_wrapper.ids import Ids
from claude_wrapper.limits import CHANNEL as LIMITS_CHANNEL
from claude_wrapper.limits import (
    Admission,
    Alert,
    AlertDesk,
    LimitCounts,
    Limits,
    LimitSettings,
    RuleBook,
    WithoutStore,
    memory_stores,
    open_client,
    redis_stores,
)
from claude_wrapper.storage import migrations
from claude_wrapper.storage.announcer import Announcer
from claude_wrapper.storage.engine import Database
from claude_wrapper.storage.state import MemoryState, SharedState
from claude_wrapper.storage.state.redis import RedisState
from claude_wrapper.tenancy.announcements import CHANNEL as TENANCY_CHANNEL
from claude_wrapper.tenancy.audit import Scribe
from claude_wrapper.tenancy.bootstrap import ensure_operator
from claude_wrapper.tenancy.keyformat import Pepper
from claude_wrapper.tenancy.keyring import KeyRing
from claude_wrapper.tenancy.partners import Partners
from claude_wrapper.tenancy.policybook import PolicyBook
from claude_wrapper.tenancy.principal import Principal, operator
from claude_wrapper.usage import Ledger, LedgerCounts, LedgerSettings, PriceBook, Reports, Spill, from_file, packaged
from claude_wrapper.usage.prices import CHANNEL as PRICES_CHANNEL
from claude_wrapper.vault.credentials import CHANNEL as VAULT_CHANNEL
from claude_wrapper.vault.credentials import Rules
from claude_wrapper.vault.keys import (
    KmsMasterKey,
    LocalMasterKey,
    MasterKey,
    create_key_file,
    parse_keys,
    read_key_file,
)
from claude_wrapper.vault.kinds import UrlPolicy
from claude_wrapper.vault.oauth import OAuthRefresher, OAuthSettings
from claude_wrapper.vault.orgkeys import OrgKeys, unseal
from claude_wrapper.vault.resolve import OperatorCredential, Resolver
from claude_wrapper.vault.tokens import HttpTokenEndpoint

log = structlog.get_logger(__name__)

_LAST_USED_SECONDS: Final = 30.0
_SPILL_ID: Final = "spill"
MASTER_KEY_FILE: Final = "master.key"
"""In the data directory, unless a setting gives the key."""


@dataclass(frozen=True, slots=True)
class Tenants:
    """What the routes and the composition root need of it."""

    database: Database
    state: SharedState
    keyring: KeyRing
    pepper: Pepper
    master: MasterKey
    org_keys: OrgKeys
    resolver: Resolver
    vault_rules: Rules
    admission: Admission
    limit_counts: LimitCounts
    ledger: Ledger
    ledger_counts: LedgerCounts
    prices: PriceBook
    policies: PolicyBook
    caches: Caches
    reports: Reports
    operator: Principal
    new_operator_key: str | None


class LoggedAlerts:
    """Budget alerts go to the log; webhooks and mail are further sinks."""

    async def raised(self, alert: Alert) -> None:
        log.warning(
            "budget.alert",
            budget=alert.budget.id,
            scope=alert.budget.scope.value,
            percent=alert.percent,
            cap_micros=alert.budget.cap_micros,
        )


@contextlib.asynccontextmanager
async def running_tenants(settings: Settings, data_dir: Path, clock: Clock, ids: Ids) -> AsyncIterator[Tenants]:
    """Raises ConfigurationError, StorageUnavailable or VaultSealed when it cannot start, with the reason."""
    async with contextlib.AsyncExitStack() as stack:
        database = Database(database_url_of(settings, data_dir), clock=clock)
        stack.push_async_callback(database.close)
        await migrations.prepare(database)
        state: SharedState = RedisState(settings.redis_url, prefix="cw:") if settings.redis_url else MemoryState(clock)
        stack.push_async_callback(state.close)
        master = master_key_of(settings, data_dir)
        await unseal(database, master, clock)
        pepper = Pepper(pepper_of(settings, data_dir))
        scribe = Scribe(clock, ids)
        async with database.transaction() as tx:
            boot = await ensure_operator(tx, scribe, pepper)
        keyring = KeyRing(database, pepper, clock)
        org_keys = OrgKeys(database, master, clock)
        key = settings.anthropic_api_key
        refresher = await stack.enter_async_context(
            _refreshing(settings, database, org_keys, state, clock=clock, ids=ids)
        )
        resolver = Resolver(
            database,
            org_keys,
            clock,
            refresher=refresher,
            operator=OperatorCredential(key, settings.upstream_url) if key else None,
        )
        prices = PriceBook(from_file(settings.price_file) if settings.price_file else packaged(), database, clock)
        limit_counts, ledger_counts = LimitCounts(), LedgerCounts()
        defaults = limit_settings(settings)
        rules = RuleBook(database, clock, defaults, limit_counts)
        policies = PolicyBook(database, clock)
        caches = Caches(settings, clock, org_keys, Partners(database, policies), holder=ids.new("replica"))
        stack.push_async_callback(caches.close)
        announcer = Announcer(state, clock)
        announcer.on(TENANCY_CHANNEL, keyring.heard)
        announcer.on(TENANCY_CHANNEL, policies.heard)
        announcer.on(LIMITS_CHANNEL, _forget(rules.forget))
        announcer.on(PRICES_CHANNEL, _forget(prices.forget))
        announcer.on(VAULT_CHANNEL, _forget(resolver.forget))
        database.listener = announcer
        announcer.start()
        stack.push_async_callback(announcer.close)
        stores = memory_stores(clock)
        if settings.redis_url:
            client = open_client(settings.redis_url)
            stack.push_async_callback(client.aclose)
            stores = redis_stores(client)
        reports = Reports(database)
        admission = Admission(
            rules,
            stores,
            reports,
            prices,
            AlertDesk(database, LoggedAlerts(), clock, limit_counts),
            clock=clock,
            ids=ids,
            settings=defaults,
            counts=limit_counts,
        )
        spill = Spill(data_dir / "ledger-spill", ids.new(_SPILL_ID))
        # Nobody waits for a row, and a commit costs as much CPU for one as for ten: about a tenth of a warm turn's.
        settled = LedgerSettings(linger_seconds=0.1)
        ledger = Ledger(database, prices, spill, clock, settings=settled, counts=ledger_counts)
        stack.push_async_callback(ledger.close)
        stack.push_async_callback(_save_last_used, keyring)
        for upkeep in (
            admission.concurrency.keep(),
            admission.spending.keep(),
            ledger.keep(),
            _keep_last_used(keyring, clock),
        ):
            stack.push_async_callback(_cancel, asyncio.get_running_loop().create_task(upkeep))
        yield Tenants(
            database=database,
            state=state,
            keyring=keyring,
            pepper=pepper,
            master=master,
            org_keys=org_keys,
            resolver=resolver,
            vault_rules=Rules(
                allow_oauth=settings.allow_oauth,
                urls=UrlPolicy(allow_http=settings.upstream_private, allow_private=settings.upstream_private),
            ),
            admission=admission,
            limit_counts=limit_counts,
            ledger=ledger,
            ledger_counts=ledger_counts,
            prices=prices,
            policies=policies,
            caches=caches,
            reports=reports,
            operator=replace(operator(key_id=boot.key_id).acting_in(boot.organization.id), is_staff=True),
            new_operator_key=None if settings.admin_key else boot.secret,
        )


@contextlib.asynccontextmanager
async def _refreshing(
    settings: Settings, database: Database, org_keys: OrgKeys, state: SharedState, *, clock: Clock, ids: Ids
) -> AsyncIterator[OAuthRefresher | None]:
    """Keeps the access tokens of stored OAuth credentials fresh, where the operator allows such credentials."""
    if not settings.allow_oauth:
        yield None
        return
    async with aiohttp.ClientSession() as session:
        refresher = OAuthRefresher(
            database,
            org_keys,
            state,
            HttpTokenEndpoint(session, settings.oauth_token_url),
            clock=clock,
            ids=ids,
            settings=OAuthSettings(settings.oauth_client_id),
        )
        try:
            yield refresher
        finally:
            await refresher.close()


def _forget(forget: Callable[[str], None]) -> Callable[[bytes | None], None]:
    """A hearer for caches per organisation. What may have been missed expires by itself within seconds."""

    def hear(payload: bytes | None) -> None:
        if payload is not None:
            forget(payload.decode())

    return hear


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})


async def _keep_last_used(keyring: KeyRing, clock: Clock) -> None:
    while True:
        await clock.sleep(_LAST_USED_SECONDS)
        await _save_last_used(keyring)


async def _save_last_used(keyring: KeyRing) -> None:
    try:
        await keyring.save_last_used()
    except StorageUnavailable as error:
        log.warning("keys.last_used_not_saved", cause=error.message)


def limit_settings(settings: Settings) -> LimitSettings:
    """The defaults for everyone. Raises ConfigurationError or InvalidRequest for limits that cannot be read."""
    return LimitSettings(
        default_key=Limits.parse(settings.key_limits),
        default_user=Limits.parse(settings.user_limits),
        default_workspace=Limits.parse(settings.workspace_limits),
        default_organization=Limits.parse(settings.org_limits),
        rates_without_store=WithoutStore(settings.rates_without_store),
        budgets_without_store=WithoutStore(settings.budgets_without_store),
    )


def database_url_of(settings: Settings, data_dir: Path) -> str:
    """Where the database is."""
    return settings.database_url or f"sqlite:///{data_dir / 'claude-wrapper.db'}"


def master_key_of(settings: Settings, data_dir: Path) -> MasterKey:
    """The vault's master key; made at the first start of all. Raises ConfigurationError."""
    if settings.kms_client:
        return _kms_of(settings, settings.kms_client)
    if settings.master_key:
        return LocalMasterKey(parse_keys(settings.master_key, source="CLAUDE_WRAPPER_MASTER_KEY"))
    path = data_dir / MASTER_KEY_FILE
    with contextlib.suppress(FileExistsError):
        create_key_file(path)
    return LocalMasterKey(read_key_file(path))


def _kms_of(settings: Settings, name: str) -> MasterKey:
    """Master keys in the KMS that the operator's own code speaks to."""
    if settings.master_key or not settings.kms_keys:
        raise ConfigurationError("CLAUDE_WRAPPER_KMS_CLIENT needs CLAUDE_WRAPPER_KMS_KEYS, and no MASTER_KEY beside it")
    module, _, function = name.partition(":")
    try:
        client = getattr(importlib.import_module(module), function)()
    except Exception as error:
        raise ConfigurationError(f"CLAUDE_WRAPPER_KMS_CLIENT: {name} gives no client: {error}") from error
    primary, *readable = settings.kms_keys
    return KmsMasterKey(client, primary, readable)


def pepper_of(settings: Settings, data_dir: Path) -> bytes:
    """The secret that API keys are stored under: replicas must share it."""
    if settings.key_pepper:
        return settings.key_pepper.encode()
    path = data_dir / "pepper"
    with contextlib.suppress(FileExistsError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32))
    try:
        return path.read_text(encoding="ascii").strip().encode()
    except OSError as error:
        raise ConfigurationError(f"{path}: the pepper of the API keys cannot be read: {error.strerror}") from error
