"""The hot counters in Redis or Valkey: all replicas share them. Each method is one script, one round trip, atomic.

The time is the Redis server's own: replicas' clocks differ, and one clock must decide. Tests may inject another.
Scripts repeat the arithmetic of `gcra` and `budgets`; `tests/limits/test_stores.py` runs every adapter through the same
suite and both against each other. Numbers travel as text: Lua would cut fractions from what it returns. Written for
redis-py 8 with `decode_responses` either way; needs Redis 5 or later (scripts replicate by effects).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, cast

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from claude_wrapper.limits.stores import Balance, Cap, Charge, Hold, Reserved, Spent, StoreGone, Stores, Taken

TIMEOUT: Final = 0.25
"""Seconds for one question: a request must not wait longer for permission than for most answers."""
_NOW: Final = """
local now = tonumber(ARGV[1])
if not now then local t = redis.call('TIME'); now = tonumber(t[1]) + tonumber(t[2]) / 1e6 end
"""
_TAKE: Final = (
    _NOW
    + """
local function text(x) return string.format('%.17g', x) end
local used, answer = {}, {'0'}
for i, key in ipairs(KEYS) do
  local a = 2 + (i - 1) * 5
  local limit, period, capacity, cost = tonumber(ARGV[a]), tonumber(ARGV[a+1]), tonumber(ARGV[a+2]), tonumber(ARGV[a+3])
  local found, u = redis.call('GET', key), 0
  if found then
    local level, at = string.match(found, '^(%S+) (%S+)$')
    u = math.max(0, tonumber(level) - math.max(0, now - tonumber(at)) * (limit / period))
  end
  used[i] = u
  answer[i + 1] = text(u)
  if answer[1] == '0' and u + math.min(cost, capacity) > capacity + 1e-6 then answer[1] = tostring(i) end
end
if answer[1] ~= '0' then return answer end
for i, key in ipairs(KEYS) do
  local a = 2 + (i - 1) * 5
  if ARGV[a+4] == '1' then
    local u = used[i] + tonumber(ARGV[a+3])
    answer[i + 1] = text(u)
    local ttl = math.ceil(u / (tonumber(ARGV[a]) / tonumber(ARGV[a+1]))) + 1
    redis.call('SET', key, text(u) .. ' ' .. text(now), 'EX', ttl)
  end
end
return answer
"""
)
_SETTLE_RATES: Final = (
    _NOW
    + """
for i, key in ipairs(KEYS) do
  local a = 2 + (i - 1) * 3
  local per_second, u = tonumber(ARGV[a]) / tonumber(ARGV[a+1]), 0
  local found = redis.call('GET', key)
  if found then
    local level, at = string.match(found, '^(%S+) (%S+)$')
    u = math.max(0, tonumber(level) - math.max(0, now - tonumber(at)) * per_second)
  end
  u = math.max(0, u + tonumber(ARGV[a+2]))
  if u == 0 then redis.call('DEL', key)
  else redis.call('SET', key, string.format('%.17g %.17g', u, now), 'EX', math.ceil(u / per_second) + 1) end
end
return 1
"""
)
_ACQUIRE: Final = (
    _NOW
    + """
local lease, ttl = ARGV[2], tonumber(ARGV[3])
for i, key in ipairs(KEYS) do
  redis.call('ZREMRANGEBYSCORE', key, '-inf', string.format('%.17g', now))
  if not redis.call('ZSCORE', key, lease) and redis.call('ZCARD', key) >= tonumber(ARGV[3 + i]) then return i end
end
for _, key in ipairs(KEYS) do
  redis.call('ZADD', key, string.format('%.17g', now + ttl), lease)
  redis.call('EXPIRE', key, math.ceil(ttl) + 60)
end
return 0
"""
)
_RENEW: Final = (
    _NOW
    + """
local ttl = tonumber(ARGV[2])
for i, key in ipairs(KEYS) do
  redis.call('ZADD', key, string.format('%.17g', now + ttl), ARGV[2 + i])
  redis.call('EXPIRE', key, math.ceil(ttl) + 60)
end
return 1
"""
)
_HELD: Final = (
    _NOW
    + """
return redis.call('ZCOUNT', KEYS[1], '(' .. string.format('%.17g', now), '+inf')
"""
)
# An account is a hash: spent, reserved, and one field `r:<reservation>` = "amount expiry" per call in flight. When a
# reservation expires its amount becomes 0 but the field stays: the call may still end, and then it must count.
_EXPIRE_ACCOUNT: Final = """
local function expire(key)
  local due = redis.call('ZRANGEBYSCORE', key .. ':x', '-inf', string.format('%.17g', now))
  for _, reservation in ipairs(due) do
    local amount = redis.call('HGET', key, 'r:' .. reservation)
    if amount and amount ~= '0' then
      redis.call('HINCRBY', key, 'reserved', '-' .. amount)
      redis.call('HSET', key, 'r:' .. reservation, '0')
    end
    redis.call('ZREM', key .. ':x', reservation)
  end
end
local function balance(key)
  local found = redis.call('HMGET', key, 'spent', 'reserved')
  return found[1], found[2]
end
"""
_RESERVE: Final = (
    _NOW
    + _EXPIRE_ACCOUNT
    + """
local reservation, amount, ttl = ARGV[2], ARGV[3], tonumber(ARGV[4])
local answer, missing = {'0', ''}, {}
for i, key in ipairs(KEYS) do
  expire(key)
  local spent, reserved = balance(key)
  if not spent then missing[#missing + 1] = tostring(i)
  else
    answer[#answer + 1] = spent
    answer[#answer + 1] = reserved
    local a = 5 + (i - 1) * 2
    local cap, enforce = tonumber(ARGV[a]), ARGV[a + 1] == '1'
    local s, r = tonumber(spent), tonumber(reserved)
    local fits = s + r + tonumber(amount) <= cap or (r == 0 and s < cap)
    if answer[1] == '0' and enforce and not fits and redis.call('HEXISTS', key, 'r:' .. reservation) == 0 then
      answer[1] = tostring(i)
    end
  end
end
if #missing > 0 then return {'0', table.concat(missing, ' ')} end
if answer[1] ~= '0' then return answer end
for _, key in ipairs(KEYS) do
  if redis.call('HSETNX', key, 'r:' .. reservation, amount) == 1 then
    redis.call('HINCRBY', key, 'reserved', amount)
    redis.call('ZADD', key .. ':x', string.format('%.17g', now + ttl), reservation)
    local left = redis.call('PTTL', key)
    if left > 0 then redis.call('PEXPIRE', key .. ':x', left) end
  end
end
return answer
"""
)
_SETTLE_SPEND: Final = (
    _NOW
    + _EXPIRE_ACCOUNT
    + """
local reservation, cost, answer = ARGV[2], ARGV[3], {}
for _, key in ipairs(KEYS) do
  local spent, reserved = balance(key)
  local before, after = spent or '0', spent or '0'
  local amount = redis.call('HGET', key, 'r:' .. reservation)
  if spent and amount then
    redis.call('HDEL', key, 'r:' .. reservation)
    redis.call('ZREM', key .. ':x', reservation)
    redis.call('HINCRBY', key, 'reserved', amount == '0' and '0' or '-' .. amount)
    redis.call('HINCRBY', key, 'spent', cost)
    after = redis.call('HGET', key, 'spent')
  end
  answer[#answer + 1] = before
  answer[#answer + 1] = after
end
return answer
"""
)
_OPEN: Final = """
if redis.call('HSETNX', KEYS[1], 'spent', ARGV[1]) == 0 then return 0 end
redis.call('HSET', KEYS[1], 'reserved', '0')
redis.call('EXPIRE', KEYS[1], ARGV[2])
return 1
"""
_RAISE_TO: Final = """
local spent = redis.call('HGET', KEYS[1], 'spent')
if not spent then return 0 end
if tonumber(spent) < tonumber(ARGV[1]) then redis.call('HSET', KEYS[1], 'spent', ARGV[1]) end
redis.call('EXPIRE', KEYS[1], ARGV[2])
redis.call('EXPIRE', KEYS[1] .. ':x', ARGV[2])
return 1
"""
_BALANCES: Final = (
    _NOW
    + _EXPIRE_ACCOUNT
    + """
local answer = {}
for _, key in ipairs(KEYS) do
  expire(key)
  local spent, reserved = balance(key)
  answer[#answer + 1] = spent or ''
  answer[#answer + 1] = reserved or ''
end
return answer
"""
)


class _Scripts:
    """Runs scripts with a bound on time; any failure of the link is StoreGone."""

    def __init__(self, client: Redis, *, timeout: float, now: Callable[[], float] | None) -> None:
        self._client = client
        self._timeout = timeout
        self._now = now

    async def run(self, script: Any, keys: Sequence[str], *args: str) -> Any:
        now = "" if self._now is None else repr(self._now())
        return await self.bounded(lambda: script(keys=keys, args=(now, *args)))

    async def bounded(self, ask: Callable[[], Awaitable[Any]]) -> Any:
        try:
            async with asyncio.timeout(self._timeout):
                return await ask()
        except (RedisError, OSError, TimeoutError) as error:
            raise StoreGone(f"the shared counters cannot be reached: {type(error).__name__}") from error


def _scripts(
    client: Redis, timeout: float, now: Callable[[], float] | None, *sources: str
) -> tuple[_Scripts, list[Any]]:
    # register_script sends EVALSHA and, once per server, the source: it survives a restarted Redis.
    return _Scripts(client, timeout=timeout, now=now), [client.register_script(source) for source in sources]


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


class RedisRates:
    """`RateStore`: one string `used at` per key, gone when drained."""

    def __init__(self, client: Redis, *, timeout: float = TIMEOUT, now: Callable[[], float] | None = None) -> None:
        """`timeout` in seconds per question; `now` (seconds) replaces the server's clock in tests."""
        self._scripts, (self._take, self._settle) = _scripts(client, timeout, now, _TAKE, _SETTLE_RATES)

    async def take(self, charges: Sequence[Charge]) -> Taken:
        if not charges:
            return Taken(None, ())
        args: list[str] = []
        for charge in charges:
            rate = charge.rate
            args += (
                str(rate.limit),
                repr(rate.period),
                str(rate.capacity),
                repr(charge.cost),
                "1" if charge.commit else "0",
            )
        answer = await self._scripts.run(self._take, [charge.key for charge in charges], *args)
        refused = int(answer[0])
        return Taken(refused - 1 if refused else None, tuple(float(used) for used in answer[1:]))

    async def settle(self, charges: Sequence[Charge]) -> None:
        if not charges:
            return
        args: list[str] = []
        for charge in charges:
            args += (str(charge.rate.limit), repr(charge.rate.period), repr(charge.cost))
        await self._scripts.run(self._settle, [charge.key for charge in charges], *args)


class RedisLeases:
    """`LeaseStore`: one sorted set per key, scored by expiry."""

    def __init__(self, client: Redis, *, timeout: float = TIMEOUT, now: Callable[[], float] | None = None) -> None:
        self._client = client
        self._scripts, (self._acquire, self._renew, self._held) = _scripts(
            client, timeout, now, _ACQUIRE, _RENEW, _HELD
        )

    async def acquire(self, holds: Sequence[Hold], lease: str, ttl: float) -> int | None:
        if not holds:
            return None
        capacities = [str(hold.capacity) for hold in holds]
        full = int(await self._scripts.run(self._acquire, [hold.key for hold in holds], lease, repr(ttl), *capacities))
        return full - 1 if full else None

    async def renew(self, leases: Sequence[tuple[str, Sequence[str]]], ttl: float) -> None:
        # A cluster runs a script on one node: keys go together by what their braces hold, the organisation.
        together: dict[str, list[tuple[str, str]]] = {}
        for lease, keys in leases:
            for key in keys:
                together.setdefault(key[key.find("{") : key.find("}") + 1], []).append((key, lease))
        for pairs in together.values():
            for start in range(0, len(pairs), 500):
                part = pairs[start : start + 500]
                await self._scripts.run(self._renew, [key for key, _ in part], repr(ttl), *(lease for _, lease in part))

    async def release(self, keys: Sequence[str], lease: str) -> None:
        if len(keys) == 1:  # the usual case; a pipeline costs as much again
            await self._scripts.bounded(lambda: cast("Awaitable[Any]", self._client.zrem(keys[0], lease)))
            return
        if not keys:
            return
        async with self._client.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.zrem(key, lease)
            await self._scripts.bounded(pipe.execute)

    async def held(self, key: str) -> int:
        return int(await self._scripts.run(self._held, [key]))


class RedisSpend:
    """`SpendStore`: one hash per budget window."""

    def __init__(self, client: Redis, *, timeout: float = TIMEOUT, now: Callable[[], float] | None = None) -> None:
        sources = (_RESERVE, _SETTLE_SPEND, _OPEN, _RAISE_TO, _BALANCES)
        self._scripts, made = _scripts(client, timeout, now, *sources)
        self._reserve, self._settle, self._open, self._raise, self._balances = made

    async def reserve(self, caps: Sequence[Cap], reservation: str, amount: int, ttl: float) -> Reserved:
        if not caps:
            return Reserved(None, (), ())
        args: list[str] = []
        for cap in caps:
            args += (str(cap.cap), "1" if cap.enforce else "0")
        keys = [cap.key for cap in caps]
        answer = await self._scripts.run(self._reserve, keys, reservation, str(amount), repr(ttl), *args)
        missing = tuple(int(index) - 1 for index in _text(answer[1]).split())
        refused = int(answer[0])
        return Reserved(refused - 1 if refused else None, missing, tuple(_pairs(answer[2:], Balance)))

    async def settle(self, keys: Sequence[str], reservation: str, cost: int) -> tuple[Spent, ...]:
        if not keys:
            return ()
        answer = await self._scripts.run(self._settle, list(keys), reservation, str(cost))
        return tuple(_pairs(answer, Spent))

    async def open(self, key: str, spent: int, ttl: float) -> None:
        await self._written(self._open, key, spent, ttl)

    async def raise_to(self, key: str, spent: int, ttl: float) -> None:
        await self._written(self._raise, key, spent, ttl)

    async def _written(self, script: Any, key: str, spent: int, ttl: float) -> None:
        args = (str(spent), str(max(1, round(ttl))))
        await self._scripts.bounded(lambda: cast("Awaitable[Any]", script(keys=[key], args=args)))

    async def balances(self, keys: Sequence[str]) -> tuple[Balance | None, ...]:
        if not keys:
            return ()
        answer = await self._scripts.run(self._balances, list(keys))
        return tuple(
            Balance(int(spent), int(reserved)) if spent else None
            for spent, reserved in zip(answer[::2], answer[1::2], strict=True)
        )


def _pairs(flat: Sequence[Any], make: Callable[[int, int], Any]) -> list[Any]:
    return [make(int(first), int(second)) for first, second in zip(flat[::2], flat[1::2], strict=True)]


def redis_stores(client: Redis, *, timeout: float = TIMEOUT, now: Callable[[], float] | None = None) -> Stores:
    """All three, over one client; the caller closes it."""
    return Stores(
        RedisRates(client, timeout=timeout, now=now),
        RedisLeases(client, timeout=timeout, now=now),
        RedisSpend(client, timeout=timeout, now=now),
    )


def open_client(url: str, *, connections: int = 50) -> Redis:
    """A client that fails at once: waiting and retrying are decided here, by time-outs and policies."""
    pool = BlockingConnectionPool.from_url(
        url, max_connections=connections, timeout=TIMEOUT, retry=Retry(NoBackoff(), 1), socket_connect_timeout=TIMEOUT
    )
    return Redis.from_pool(pool)
