"""From operators to calls of kernels: sites, the choice of a kernel, index lists, calls."""
