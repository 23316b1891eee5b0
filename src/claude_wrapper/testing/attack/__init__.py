"""Attacks from inside every sandbox level of this host: `python -m claude_wrapper.testing.attack`."""
