"""How much of two public suites of operators builds and computes right: PyTorch's OpInfo and ONNX's backend tests.

python -m benchmarks.conformance.opinfo --out benchmarks/results/conformance-opinfo.json
python -m benchmarks.conformance.onnx_backend --out benchmarks/results/conformance-onnx.json
python -m benchmarks.conformance.page    # docs/operators.md from both results
"""
