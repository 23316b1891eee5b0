"""All tables, declared on `storage.schema.metadata`. Importing this package imports every module in it."""

from __future__ import annotations

import importlib
import pkgutil

TABLE_MODULES = tuple(sorted(found.name for found in pkgutil.iter_modules(__path__)))
for _name in TABLE_MODULES:
    importlib.import_module(f"{__name__}.{_name}")
