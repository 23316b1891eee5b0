"""Which process serves which conversation: pure decisions (`plan`), slots, a fair queue, and a thin async shell."""

from claude_wrapper.pool.pool import Claim, Pool
from claude_wrapper.pool.ports import OnHibernate, OnLost, Process, SlotFactory
from claude_wrapper.pool.requests import ClaimRequest, Keep, Kind
from claude_wrapper.pool.settings import PoolSettings, Profile
from claude_wrapper.pool.slot import Reason
from claude_wrapper.pool.stats import PoolStats, SlotStats

__all__ = [
    "Claim",
    "ClaimRequest",
    "Keep",
    "Kind",
    "OnHibernate",
    "OnLost",
    "Pool",
    "PoolSettings",
    "PoolStats",
    "Process",
    "Profile",
    "Reason",
    "SlotFactory",
    "SlotStats",
]
