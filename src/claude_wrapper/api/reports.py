"""What `/health` and `/v1/security` say."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from claude_wrapper.clock import Clock
from claude_wrapper.errors import WrapperError
from claude_wrapper.sandbox.port import Sandbox
from claude_wrapper.sandbox.probe import HostReport
from claude_wrapper.sandbox.security import SecurityLevels, SecurityPolicy

_CHECK_SECONDS: Final = 2.0
"""A check that has not answered by then has failed."""
_FRESH_SECONDS: Final = 1.0
"""A report is given again for this long, so that probes cannot load what they probe."""


def security_report(
    sandbox: Sandbox, levels: SecurityLevels, policy: SecurityPolicy, host: HostReport
) -> dict[str, Any]:
    """Sandbox and security level in force for the caller, what may be chosen, and every mechanism of this host."""
    return {
        "sandbox": sandbox.level.value,
        "separate_uid": sandbox.separate_uid,
        "security_level": policy.level.value,
        "security_levels": [level.value for level in levels.allowed],
        "server_security_level": levels.default.value,
        "allowed": {
            "tools": list(policy.tools),
            "permission_modes": list(policy.permission_modes),
            "egress": policy.egress.value,
            "local_mcp": policy.local_mcp,
            "limits": dataclasses.asdict(policy.limits),
        },
        "lowered": list(policy.lowered),
        "host": host.to_wire(),
    }


@dataclass(frozen=True, slots=True)
class Found:
    """What a check found."""

    ok: bool
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing to look at."""

    name: str
    """A word of `metrics.HEALTH_CHECKS`."""
    look: Callable[[], Awaitable[Found]]
    """May raise a WrapperError or OSError: then it failed, with that cause."""
    matters: bool = True
    """Whether a server without it should get no work. What another replica would lack as well does not matter."""


class Health:
    """All checks, side by side, each in bounded time; asked often, looked at once a second."""

    def __init__(
        self, checks: Sequence[Check], clock: Clock, version: str, *, told: Callable[[str, bool], None]
    ) -> None:
        """`told` hears the result of each check that was made."""
        self._checks = tuple(checks)
        self._clock = clock
        self._version = version
        self._told = told
        self._report: dict[str, Any] | None = None
        self._made_at = float("-inf")
        self._making: asyncio.Task[dict[str, Any]] | None = None

    async def report(self) -> dict[str, Any]:
        """`status` is healthy, degraded (something fails that another replica would lack too) or unhealthy."""
        if self._report is not None and self._clock.monotonic() - self._made_at < _FRESH_SECONDS:
            return self._report
        if self._making is None:
            self._making = asyncio.get_running_loop().create_task(self._make(), name="health")
        return await asyncio.shield(self._making)

    async def close(self) -> None:
        """Give up what is being looked at."""
        if self._making is not None:
            self._making.cancel()
            await asyncio.gather(self._making, return_exceptions=True)

    async def _make(self) -> dict[str, Any]:
        try:
            results = await asyncio.gather(*(self._look(check) for check in self._checks))
            checks = {check.name: result for check, result in zip(self._checks, results, strict=True)}
            failing = [check for check in self._checks if not checks[check.name]["ok"]]
            unhealthy = any(check.matters for check in failing)
            self._report = {
                "status": "unhealthy" if unhealthy else "degraded" if failing else "healthy",
                "version": self._version,
                "failing": sorted(check.name for check in failing),
                "checks": checks,
            }
            self._made_at = self._clock.monotonic()
            return self._report
        finally:
            self._making = None

    async def _look(self, check: Check) -> dict[str, Any]:
        began = self._clock.monotonic()
        cause: str | None = None
        try:
            async with asyncio.timeout(_CHECK_SECONDS):
                found = await check.look()
        except TimeoutError:
            found, cause = Found(ok=False), f"no answer within {_CHECK_SECONDS:g} s"
        except WrapperError as error:
            found, cause = Found(ok=False), error.code  # its message may name hosts: this page needs no key
        except OSError as error:
            found, cause = Found(ok=False), error.strerror or type(error).__name__
        self._told(check.name, found.ok)
        result = {"ok": found.ok, "matters": check.matters, "seconds": round(self._clock.monotonic() - began, 4)}
        return {**result, **found.figures, **({"cause": cause} if cause else {})}
