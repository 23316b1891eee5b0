"""Realistic load with faults from a seed, and what must hold at its end."""
