"""Random small networks, built and compared with PyTorch in float64: what nobody thought of testing."""
