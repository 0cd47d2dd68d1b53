"""DANCE: dynamic 3D CNN pruning in two steps, AVA (variability) and AAP (a controller that decides for each clip)."""
