"""Kernels for GPUs: the same index lists, walked by blocks of threads."""
