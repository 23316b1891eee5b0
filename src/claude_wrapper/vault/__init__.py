"""Credentials of tenants, encrypted at rest; leased to the broker, never to a process."""
