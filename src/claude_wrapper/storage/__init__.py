"""Where things are kept: the database, shared state between replicas, and blobs."""

from __future__ import annotations

from claude_wrapper.storage.engine import Announcement, Database, DatabaseSettings, announce

__all__ = ["Announcement", "Database", "DatabaseSettings", "announce"]
