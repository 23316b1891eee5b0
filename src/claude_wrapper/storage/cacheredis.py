"""The cache store of many replicas, on Redis or Valkey (one server, not a cluster: the scripts name keys by themselves).

Redis evicts by its own memory limit, if it has one, and knows nothing of ours. So the sizes are kept beside the values:
a sorted set by last use, one by end of life and a hash of sizes, changed by the same script that changes the value.
An entry that Redis dropped by itself stays counted until its end.
"""

from __future__ import annotations

from typing import Any

from claude_wrapper.storage.cache import Bounds, entry_cost
from claude_wrapper.storage.state.redis import RedisLink, milliseconds

# KEYS of all: value, by use, by end, sizes, total. Members of the sets are the value's key.
_GET = """
local value = redis.call('GET', KEYS[1])
if not value then return {} end
local time = redis.call('TIME')
redis.call('ZADD', KEYS[2], 'XX', tonumber(time[1]) * 1000000 + tonumber(time[2]), KEYS[1])
return {value}
"""

_FORGET = """
local function forget(member)
  local size = tonumber(redis.call('HGET', KEYS[4], member) or '0')
  redis.call('HDEL', KEYS[4], member)
  redis.call('ZREM', KEYS[2], member)
  redis.call('ZREM', KEYS[3], member)
  if size > 0 then redis.call('DECRBY', KEYS[5], size) end
  return redis.call('DEL', member)
end
"""

# ARGV: value, cost, ttl in ms, most bytes in all.
_PUT = (
    _FORGET
    + """
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
for _, member in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', now, 'LIMIT', 0, 100)) do forget(member) end
forget(KEYS[1])
local cost, most = tonumber(ARGV[2]), tonumber(ARGV[4])
while tonumber(redis.call('GET', KEYS[5]) or '0') + cost > most do
  local oldest = redis.call('ZRANGE', KEYS[2], 0, 0)[1]
  if not oldest then redis.call('DEL', KEYS[5]); break end
  forget(oldest)
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[3])
redis.call('ZADD', KEYS[2], tonumber(time[1]) * 1000000 + tonumber(time[2]), KEYS[1])
redis.call('ZADD', KEYS[3], now + tonumber(ARGV[3]), KEYS[1])
redis.call('HSET', KEYS[4], KEYS[1], cost)
redis.call('INCRBY', KEYS[5], cost)
return {1}
"""
)

_DELETE = _FORGET + "return {forget(KEYS[1])}"

_CLAIM = """
local present = redis.call('GET', KEYS[1])
if present and present ~= ARGV[1] then return {0} end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return {1}
"""

_UNCLAIM = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end return {}"


class RedisStore:
    """A store that replicas share. Its connections are its own: a large value does not hold up leases and limits."""

    def __init__(
        self, url: str, bounds: Bounds, *, prefix: str = "cw", max_connections: int = 20, timeout: float = 0.5
    ) -> None:
        """`timeout`: seconds for connecting and for one command; later than that a value is not worth waiting for."""
        self._link = RedisLink(url, max_connections=max_connections, timeout=timeout)
        self._bounds = bounds
        self._prefix = f"{prefix}:cache"
        self._books = [f"{self._prefix}:{name}" for name in ("used", "ends", "sizes", "total")]

    async def get(self, key: str) -> bytes | None:
        found = await self._run(_GET, key)
        return bytes(found[0]) if found else None

    async def put(self, key: str, value: bytes, *, ttl: float) -> bool:
        cost = entry_cost(key, value)
        if ttl <= 0 or cost > min(self._bounds.entry, self._bounds.total):
            await self.delete(key)
            return False
        await self._run(_PUT, key, value, cost, milliseconds(ttl), self._bounds.total)
        return True

    async def delete(self, key: str) -> bool:
        return bool((await self._run(_DELETE, key))[0])

    async def claim(self, key: str, holder: str, *, ttl: float) -> bool:
        return bool((await self._link.eval(_CLAIM, [self._claimed(key)], [holder, milliseconds(ttl)]))[0])

    async def unclaim(self, key: str, holder: str) -> None:
        await self._link.eval(_UNCLAIM, [self._claimed(key)], [holder])

    async def size(self) -> int:
        async with self._link.asked():
            return int(await self._link.client.get(self._books[3]) or 0)

    async def close(self) -> None:
        await self._link.close()

    async def _run(self, lua: str, key: str, *args: Any) -> list[Any]:
        return await self._link.eval(lua, [f"{self._prefix}:v:{key}", *self._books], list(args))

    def _claimed(self, key: str) -> str:
        return f"{self._prefix}:c:{key}"
