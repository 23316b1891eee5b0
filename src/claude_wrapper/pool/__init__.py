"""Which process serves which conversation."""

from claude_wrapper.pool.messages import ClaimRequest, Kind
from claude_wrapper.pool.pool import Claim, Pool
from claude_wrapper.pool.ports import Keeper, KeepsNothing, Process, SlotFactory
from claude_wrapper.pool.settings import PoolSettings, Profile
from claude_wrapper.pool.slot import Keep, Reason
from claude_wrapper.pool.stats import PoolStats, SlotStats

__all__ = [
    "Claim",
    "ClaimRequest",
    "Keep",
    "Keeper",
    "KeepsNothing",
    "Kind",
    "Pool",
    "PoolSettings",
    "PoolStats",
    "Process",
    "Profile",
    "Reason",
    "SlotFactory",
    "SlotStats",
]
