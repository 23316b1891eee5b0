"""Settings that a running server takes over: all that are marked live, or none of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import structlog

from claude_wrapper.app.telemetry import Telemetry
from claude_wrapper.app.tenants import Tenants, limit_settings
from claude_wrapper.broker.egresslists import EgressLists, base_rules
from claude_wrapper.config import Settings, changed
from claude_wrapper.errors import WrapperError

log = structlog.get_logger(__name__)


class Reloading:
    """Knows what is in force, and who must hear of a change."""

    def __init__(self, settings: Settings, telemetry: Telemetry, tenants: Tenants, egress: EgressLists | None) -> None:
        self.settings = settings
        """In force: what was read at the start, with what was taken over since."""
        self._telemetry = telemetry
        self._tenants = tenants
        self._egress = egress

    def reload(self, read: Callable[[], Settings]) -> None:
        """Read the settings again. What cannot be read, or holds a wrong value, changes nothing, and the log says why."""
        try:
            wanted = read()
            limits, hosts = limit_settings(wanted), base_rules(wanted.egress_hosts)
        except WrapperError:
            log.exception("settings.not_reloaded")
            return
        live, restart = changed(self.settings, wanted)
        self.settings = replace(self.settings, **{name: getattr(wanted, name) for name in live})
        self._telemetry.reload(self.settings)
        self._tenants.admission.settings.take(limits)
        if self._egress is not None:
            self._egress.take(hosts)
        log.warning("settings.reloaded", taken_over=list(live), needs_restart=list(restart))
