"""Timing artifacts on devices: runs, statistics, layers, clips, energy, verdicts."""
