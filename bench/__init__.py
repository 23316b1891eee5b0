"""Measurements of the product, as ratios side by side. `python -m bench` runs them and prints tables."""
