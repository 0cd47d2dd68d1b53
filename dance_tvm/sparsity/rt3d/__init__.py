"""RT3D: pruning in kernel groups."""
