"""A fixed sample of PyTorch's own samples of its operators; the benchmark runs them all."""

from __future__ import annotations

import pytest

pytest.importorskip("expecttest", reason="PyTorch's operator samples need expecttest: pip install 'dance-tvm[dev]'")

SAMPLE = (
    *("softmax/0", "cumsum/0", "gather/0", "index_put/0", "scatter_reduce/1", "as_strided/1", "where/1", "amax/1"),
    *("nn.functional.grid_sample/2", "nn.functional.interpolate/3", "nn.functional.conv_transpose3d/1"),
    *("nn.functional.max_pool3d/0", "nn.functional.pad/2", "var_mean/1", "nn.functional.bilinear/0"),
)


@pytest.mark.parametrize("case", SAMPLE)
def test_an_operators_sample_is_imported_right(case, tmp_path):
    from benchmarks.conformance import opinfo

    opinfo.attempt(case, tmp_path, build=False)
