"""Tuning logs: where they lie, what stands in them, and what a build asks of them."""
