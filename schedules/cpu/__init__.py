"""Kernels of processors: TIR with channels innermost, and their tuning spaces."""
