"""Networks that others published, through the compiler: from .pt2 and from ONNX, against PyTorch in float64.

python -m benchmarks.published --help
"""
