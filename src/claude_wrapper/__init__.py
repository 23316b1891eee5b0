"""The unmodified Claude CLI as a multi-tenant service.

The packages are laid out in `docs/architecture.md`; imports go down that table only.
"""

__version__ = "0.1.0"
