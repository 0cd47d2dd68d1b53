"""Training: the loop, data, checkpoints, and a package for each paper."""
