"""Shared state of many replicas, on one Redis or Valkey server (not a cluster: scripts touch several keys).

Every operation is one round trip. All subscriptions of a replica share one connection.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import redis.asyncio as redis_client
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError

from claude_wrapper.errors import StorageUnavailable
from claude_wrapper.storage.state.fanout import BufferedSubscription, Fanout
from claude_wrapper.storage.state.ports import Ended, Lease, Script

_CLOSE_SECONDS = 5.0

_INCREMENT = """
local after = redis.call('INCRBY', KEYS[1], ARGV[1])
if redis.call('PTTL', KEYS[1]) < 0 then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
return {after}
"""

# ARGV: whether something is expected, what; whether to set, what; ttl or 0.
_COMPARE_AND_SET = """
local present = redis.call('GET', KEYS[1])
if ARGV[1] == '1' then if present ~= ARGV[2] then return {0} end
elseif present then return {0} end
if ARGV[3] == '0' then redis.call('DEL', KEYS[1])
elseif ARGV[5] == '0' then redis.call('SET', KEYS[1], ARGV[4])
else redis.call('SET', KEYS[1], ARGV[4], 'PX', ARGV[5]) end
return {1}
"""

# A token is the server's time in microseconds, or one more than the last if that is higher: it grows even if the counter
# was lost with the server's memory, and needs one key for all leases.
_ACQUIRE = """
local present = redis.call('HGET', KEYS[1], 'holder')
if present and present ~= ARGV[1] then return {0} end
local time = redis.call('TIME')
local token = tonumber(time[1]) * 1000000 + tonumber(time[2])
local last = tonumber(redis.call('GET', KEYS[2]) or '0')
if token <= last then token = last + 1 end
local written = string.format('%.0f', token)
redis.call('SET', KEYS[2], written)
redis.call('HSET', KEYS[1], 'holder', ARGV[1], 'token', written)
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return {written}
"""

_RENEW = """
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then return {0} end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return {1}
"""

_RELEASE = """
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then return {0} end
redis.call('DEL', KEYS[1])
return {1}
"""

_HOLDER = """
local found = redis.call('HMGET', KEYS[1], 'holder', 'token')
if not found[1] then return {} end
return {found[1], found[2], redis.call('PTTL', KEYS[1])}
"""

# Scripts of others get the server's time as their last argument, so that replicas with wrong clocks agree.
_PREAMBLE = """
local time_now = redis.call('TIME')
ARGV[#ARGV + 1] = string.format('%.0f', tonumber(time_now[1]) * 1000000 + tonumber(time_now[2]))
"""


def milliseconds(seconds: float) -> int:
    """As Redis counts times to live: at least 1."""
    return max(1, round(seconds * 1000))


class RedisLink:
    """Connections to one server: exchanges are bounded in time, failures are StorageUnavailable."""

    def __init__(self, url: str, *, max_connections: int, timeout: float) -> None:
        """`url`: `redis://`, `rediss://` or `unix://`; `timeout`: seconds for connecting, for one command, for a place."""
        # No socket_timeout (its default is not None): redis-py applies it with asyncio.wait_for, which on Python 3.11 swallows a cancellation that
        # arrives together with the answer (python/cpython#86296). Each command gets an asyncio.timeout here instead.
        # The client's own retries would count twice what was counted, and hide that a subscription had a gap.
        pool = redis_client.BlockingConnectionPool.from_url(
            url,
            retry=Retry(NoBackoff(), 0),
            max_connections=max_connections,
            timeout=timeout,
            socket_timeout=None,
            socket_connect_timeout=timeout,
            health_check_interval=30,
        )
        self.client: Any = redis_client.Redis(connection_pool=pool)
        self._timeout = timeout
        self._digests: dict[str, str] = {}

    @asynccontextmanager
    async def asked(self) -> AsyncIterator[None]:
        """One exchange with the server: bounded in time, its failures mapped."""
        try:
            async with asyncio.timeout(self._timeout):
                yield
        except (RedisError, OSError) as error:  # OSError: our own TimeoutError is one
            # The text of a Redis error may quote what was sent; its class says enough.
            raise StorageUnavailable(f"the shared state (Redis) cannot be used: {type(error).__name__}") from error

    async def eval(self, lua: str, keys: Sequence[str], args: Sequence[Any]) -> list[Any]:
        """Run a script in one exchange; two when the server does not know it yet."""
        digest = self._digests.get(lua)
        if digest is None:
            digest = self._digests[lua] = hashlib.sha1(lua.encode(), usedforsecurity=False).hexdigest()
        async with self.asked():
            try:
                return list(await self.client.evalsha(digest, len(keys), *keys, *args))
            except NoScriptError:
                return list(await self.client.eval(lua, len(keys), *keys, *args))

    async def close(self) -> None:
        """Let the connections go."""
        with suppress(RedisError, OSError, TimeoutError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self.client.aclose()
                await self.client.connection_pool.disconnect()


class RedisState:
    """`SharedState` on Redis. `prefix` keeps several servers apart on one Redis."""

    def __init__(self, url: str, *, prefix: str = "cw", max_connections: int = 50, timeout: float = 2.0) -> None:
        """See `RedisLink`."""
        self._link = RedisLink(url, max_connections=max_connections, timeout=timeout)
        self._client = self._link.client
        self._asked, self._eval = self._link.asked, self._link.eval
        # Subscriptions wait for as long as nobody speaks: their connection has no read time-out.
        self._listening_client: Any = redis_client.Redis.from_url(
            url, socket_timeout=None, socket_connect_timeout=timeout, retry=Retry(NoBackoff(), 0)
        )
        self._prefix = prefix
        self._fanout = Fanout()
        self._pubsub: Any = None
        self._listener: asyncio.Task[None] | None = None
        self._confirmed: dict[str, asyncio.Event] = {}
        self._gate = asyncio.Lock()
        self._timeout = timeout
        self._closed = False

    # counters, values ------------------------------------------------------------------------------------------------

    async def increment(self, key: str, by: int = 1, *, ttl: float) -> int:
        return int((await self._eval(_INCREMENT, [self._key("c", key)], [by, milliseconds(ttl)]))[0])

    async def count(self, key: str) -> int:
        async with self._asked():
            return int(await self._client.get(self._key("c", key)) or 0)

    async def get(self, key: str) -> bytes | None:
        async with self._asked():
            value: bytes | None = await self._client.get(self._key("v", key))
            return value

    async def set(self, key: str, value: bytes, *, ttl: float | None = None) -> None:
        async with self._asked():
            await self._client.set(self._key("v", key), value, px=None if ttl is None else milliseconds(ttl))

    async def compare_and_set(
        self, key: str, expected: bytes | None, value: bytes | None, *, ttl: float | None = None
    ) -> bool:
        args = [int(expected is not None), expected or b"", int(value is not None), value or b""]
        done = await self._eval(
            _COMPARE_AND_SET, [self._key("v", key)], [*args, 0 if ttl is None else milliseconds(ttl)]
        )
        return bool(done[0])

    async def delete(self, key: str) -> bool:
        async with self._asked():
            return bool(await self._client.delete(self._key("v", key)))

    # leases ----------------------------------------------------------------------------------------------------------

    async def acquire(self, name: str, holder: str, *, ttl: float) -> Lease | None:
        keys = [self._key("l", name), self._key("fence", "last")]
        token = int((await self._eval(_ACQUIRE, keys, [holder, milliseconds(ttl)]))[0])
        return Lease(name, holder, token, ttl) if token else None

    async def renew(self, lease: Lease) -> bool:
        return bool((await self._eval(_RENEW, [self._key("l", lease.name)], [lease.token, milliseconds(lease.ttl)]))[0])

    async def release(self, lease: Lease) -> bool:
        return bool((await self._eval(_RELEASE, [self._key("l", lease.name)], [lease.token]))[0])

    async def holder(self, name: str) -> Lease | None:
        found = await self._eval(_HOLDER, [self._key("l", name)], [])
        if not found:
            return None
        return Lease(name, bytes(found[0]).decode(), int(found[1]), int(found[2]) / 1000)

    # messages --------------------------------------------------------------------------------------------------------

    async def publish(self, channel: str, message: bytes) -> None:
        async with self._asked():
            await self._client.publish(self._key("p", channel), message)

    @asynccontextmanager
    async def subscribe(self, channel: str, *, buffer: int = 1000) -> AsyncIterator[BufferedSubscription]:
        async with self._gate:
            subscription = self._fanout.add(channel, buffer)
            try:
                await self._listen(channel)
            except BaseException:
                self._fanout.remove(channel, subscription)
                raise
        try:
            yield subscription
        finally:
            if self._fanout.remove(channel, subscription):
                await self._unlisten(channel)

    async def _listen(self, channel: str) -> None:
        """Subscribe and wait for the server's word that it counts from now."""
        if self._closed:
            raise StorageUnavailable("the shared state is closed: the server is shutting down")
        if channel in self._confirmed:
            confirmed = self._confirmed[channel]
        else:
            confirmed = self._confirmed[channel] = asyncio.Event()
            try:
                async with self._asked():
                    if self._pubsub is None:
                        self._pubsub = self._listening_client.pubsub()
                    await self._pubsub.subscribe(self._key("p", channel))
            except BaseException:
                self._confirmed.pop(channel, None)
                raise
        if self._listener is None or self._listener.done():
            self._listener = asyncio.create_task(self._pump(self._pubsub), name="redis subscriptions")
        try:
            async with asyncio.timeout(self._timeout):
                await confirmed.wait()
        except TimeoutError:
            raise StorageUnavailable("the shared state (Redis) did not confirm a subscription") from None

    async def _unlisten(self, channel: str) -> None:
        async with self._gate:
            if self._fanout.has(channel) or channel not in self._confirmed:
                return
            del self._confirmed[channel]
            # Best effort: messages of a channel that nobody listens to are dropped anyway.
            with suppress(RedisError, OSError, TimeoutError):
                async with asyncio.timeout(self._timeout):
                    await self._pubsub.unsubscribe(self._key("p", channel))

    async def _pump(self, pubsub: Any) -> None:
        """Read what arrives until the link breaks; then every subscriber learns that it may have missed something."""
        start = len(self._key("p", ""))
        try:
            while True:
                message = await pubsub.parse_response(block=True)
                if not message:
                    continue
                kind, name = bytes(message[0]), bytes(message[1]).decode()[start:]
                if kind == b"message":
                    self._fanout.offer(name, bytes(message[2]))
                elif kind == b"subscribe" and name in self._confirmed:
                    self._confirmed[name].set()
        except (RedisError, OSError):
            self._drop_link(Ended.DISCONNECTED)
            with suppress(RedisError, OSError):
                await pubsub.aclose()

    def _drop_link(self, why: Ended) -> None:
        self._pubsub = None
        self._confirmed.clear()
        self._fanout.end_all(why)

    # scripts ---------------------------------------------------------------------------------------------------------

    async def run(self, script: Script, keys: Sequence[str], args: Sequence[str | int | float]) -> list[str | int]:
        found = await self._eval(_PREAMBLE + script.lua, [self._key("s", key) for key in keys], args)
        return [item.decode() if isinstance(item, bytes) else int(item) for item in found]

    def _key(self, kind: str, key: str) -> str:
        return f"{self._prefix}:{kind}:{key}"

    # end -------------------------------------------------------------------------------------------------------------

    async def ping(self) -> None:
        async with self._asked():
            await self._client.ping()

    async def close(self) -> None:
        self._closed = True
        pubsub, listener = self._pubsub, self._listener
        self._drop_link(Ended.CLOSED)
        if listener is not None:
            listener.cancel()
            await asyncio.wait([listener], timeout=_CLOSE_SECONDS)
        with suppress(RedisError, OSError, TimeoutError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                if pubsub is not None:
                    await pubsub.aclose()
                await self._listening_client.aclose()
                await self._listening_client.connection_pool.disconnect()
        await self._link.close()
