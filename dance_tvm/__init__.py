"""Trained, sparse 3D CNNs compiled to small, fast, verified artifacts."""
