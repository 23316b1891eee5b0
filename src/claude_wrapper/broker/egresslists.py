"""Which hosts an organisation's agents may reach: its security level, the operator's list, its own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

import structlog

from claude_wrapper.broker.hosts import HostRule, HostRules
from claude_wrapper.errors import ConfigurationError, InvalidRequest
from claude_wrapper.sandbox.security import Egress

log = structlog.get_logger(__name__)

REGISTRIES = (
    *("pypi.org", "files.pythonhosted.org", "registry.npmjs.org", "registry.yarnpkg.com", "index.crates.io"),
    *("crates.io", "static.crates.io", "proxy.golang.org", "sum.golang.org", "rubygems.org", "index.rubygems.org"),
)
"""What package managers ask."""

REGISTRIES_AND_GIT = (
    *REGISTRIES,
    *("github.com", "codeload.github.com", "raw.githubusercontent.com", "objects.githubusercontent.com", "gitlab.com"),
    *("bitbucket.org", "codeberg.org"),
)
"""What an allow-list always holds. Git hosts take content from anybody: data can leave through them."""

OPEN = ("*", "*:80", "*:22", "*:8080", "*:8443", "*:9418")
"""The open level: any public host on ports of the web and of git. Not mail (25, 465, 587): agents must not send it."""

EGRESS_HOSTS = "egress_hosts"
"""The setting of an organisation that holds its own patterns."""
_MAX_ORG_HOSTS = 200

OrgHosts = Callable[[str], Awaitable[Iterable[str]]]
"""An organisation's own patterns (its setting `egress_hosts`), by its id."""


async def _none(org: str) -> Iterable[str]:
    del org
    return ()


def check_org_hosts(value: Any) -> None:
    """Raises InvalidRequest, naming what is wrong with an organisation's list of patterns."""
    if not isinstance(value, list) or len(value) > _MAX_ORG_HOSTS:
        raise InvalidRequest(f"must be a list of at most {_MAX_ORG_HOSTS} host patterns", field=EGRESS_HOSTS)
    for index, pattern in enumerate(value):
        try:
            HostRule.parse(str(pattern))
        except ConfigurationError as error:
            raise InvalidRequest(error.message, field=f"{EGRESS_HOSTS}[{index}]") from error


def base_rules(hosts: Iterable[str]) -> Mapping[Egress, HostRules]:
    """What each level allows with the operator's own list of hosts. Raises ConfigurationError for what is no pattern."""
    return {
        Egress.NONE: HostRules.parse(()),
        Egress.ALLOWLIST: HostRules.parse((*REGISTRIES_AND_GIT, *hosts)),
        Egress.OPEN: HostRules.parse(OPEN),
    }


class EgressLists:
    """The rules of every organisation."""

    def __init__(
        self,
        level: Callable[[str], Awaitable[Egress]],
        hosts: Iterable[str] = (),
        of_org: OrgHosts | None = None,
    ) -> None:
        """`level` is what an organisation's security level allows; `hosts` are the operator's, beside the built-in ones.

        Raises ConfigurationError for what is no pattern.
        """
        self._level = level
        self._base = base_rules(hosts)
        self._of_org = of_org or _none

    def take(self, rules: Mapping[Egress, HostRules]) -> None:
        """From the next process on, what the operator's list allows now (`base_rules`) holds."""
        self._base = rules

    async def rules(self, org: str) -> HostRules:
        """What this organisation's agents may reach. With the level's egress `none`, an organisation's list is void."""
        level = await self._level(org)
        base = self._base[level]
        if level is not Egress.ALLOWLIST:
            return base
        own: list[HostRule] = []
        for pattern in list(await self._of_org(org))[:_MAX_ORG_HOSTS]:
            try:
                own.append(HostRule.parse(str(pattern)))
            except ConfigurationError as error:
                log.warning("egress.pattern_ignored", org=org, pattern=str(pattern)[:100], reason=error.message)
        return HostRules((*base.allow, *own)) if own else base
