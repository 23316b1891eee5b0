"""Which hosts an organisation's agents may reach: the security level, the operator's list, the organisation's own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

import structlog

from claude_wrapper.broker.hosts import HostRule, HostRules
from claude_wrapper.errors import ConfigurationError
from claude_wrapper.sandbox.security import Egress

log = structlog.get_logger(__name__)

REGISTRIES_AND_GIT = (
    *("pypi.org", "files.pythonhosted.org", "registry.npmjs.org", "registry.yarnpkg.com", "index.crates.io"),
    *("crates.io", "static.crates.io", "proxy.golang.org", "sum.golang.org", "rubygems.org", "index.rubygems.org"),
    *("github.com", "codeload.github.com", "raw.githubusercontent.com", "objects.githubusercontent.com", "gitlab.com"),
    *("bitbucket.org", "codeberg.org"),
)
"""What an allow-list always holds. Git hosts take content from anybody: data can leave through them."""

OPEN = ("*", "*:80", "*:22", "*:8080", "*:8443", "*:9418")
"""The open level: any public host on ports of the web and of git. Not mail (25, 465, 587): agents must not send it."""

_MAX_ORG_HOSTS = 200

OrgHosts = Callable[[str], Awaitable[Iterable[str]]]
"""An organisation's own patterns (its setting `egress_hosts`), by its id."""


async def _none(org: str) -> Iterable[str]:
    del org
    return ()


class EgressLists:
    """The rules of every organisation."""

    def __init__(self, egress: Egress, hosts: Iterable[str] = (), of_org: OrgHosts | None = None) -> None:
        """`hosts` are the operator's, beside the built-in ones. Raises ConfigurationError for what is no pattern."""
        self.egress = egress
        base = {Egress.NONE: (), Egress.ALLOWLIST: (*REGISTRIES_AND_GIT, *hosts), Egress.OPEN: OPEN}[egress]
        self._base = HostRules.parse(base)
        self._of_org = of_org or _none

    @property
    def any(self) -> bool:
        """Whether anything at all may be reached."""
        return self.egress is not Egress.NONE

    async def rules(self, org: str) -> HostRules:
        """What this organisation's agents may reach. With the level's egress `none`, an organisation's list is void."""
        if self.egress is not Egress.ALLOWLIST:
            return self._base
        own: list[HostRule] = []
        for pattern in list(await self._of_org(org))[:_MAX_ORG_HOSTS]:
            try:
                own.append(HostRule.parse(str(pattern)))
            except ConfigurationError as error:
                log.warning("egress.pattern_ignored", org=org, pattern=str(pattern)[:100], reason=error.message)
        return HostRules((*self._base.allow, *own)) if own else self._base
