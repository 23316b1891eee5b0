"""What replicas share while they run: counters, small values, leases, messages and atomic scripts."""

from __future__ import annotations

from claude_wrapper.storage.state.memory import MemoryState
from claude_wrapper.storage.state.ports import Cells, Ended, Lease, Script, SharedState, Subscription

__all__ = ["Cells", "Ended", "Lease", "MemoryState", "Script", "SharedState", "Subscription"]
