"""The ledger of upstream calls: what was used, what it cost, reports and exports."""

from __future__ import annotations

from claude_wrapper.usage.cost import Price
from claude_wrapper.usage.export import Exporter
from claude_wrapper.usage.ledger import Ledger, LedgerCounts, LedgerSettings
from claude_wrapper.usage.prices import Dated, PriceBook, PriceTable, from_file, packaged
from claude_wrapper.usage.reports import Bucket, Dimension, Line, Query, Reports
from claude_wrapper.usage.sinks import DirectorySink, Form, LedgerSink, ObjectSink, Part, RowLoader, WarehouseSink
from claude_wrapper.usage.spill import Spill

__all__ = [
    "Bucket",
    "Dated",
    "Dimension",
    "DirectorySink",
    "Exporter",
    "Form",
    "Ledger",
    "LedgerCounts",
    "LedgerSettings",
    "LedgerSink",
    "Line",
    "ObjectSink",
    "Part",
    "Price",
    "PriceBook",
    "PriceTable",
    "Query",
    "Reports",
    "RowLoader",
    "Spill",
    "WarehouseSink",
    "from_file",
    "packaged",
]
