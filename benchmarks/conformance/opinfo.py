"""PyTorch's own samples of its operators (OpInfo), each exported to .pt2, built for this machine, run and compared.

    python -m benchmarks.conformance.opinfo [--only PATTERN] [--import-only] [--out FILE]

A sample's first tensors are the network's inputs; what else it takes are constants, as weights and tables are in a
network. With ``--all-inputs`` every tensor is an input. Results agree within 1e-3 of a value and 1e-4, with NaN and
infinities in the same places.
"""

from __future__ import annotations

import copy
import functools
import itertools
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from benchmarks.conformance.pool import SkippedError, outputs, require_equal, run_command, suite_options
from dance_tvm import import_model

RELATIVE, ABSOLUTE = 1e-3, 1e-4
SAMPLES = 5

# Operators that networks for inference are made of, by OpInfo's names: no losses, linear algebra, random numbers,
# complex numbers, nor shapes that depend on values.
_LISTED = """
__getitem__ __radd__ __rdiv__ __rmatmul__ __rmul__ __rpow__ __rsub__ abs acos acosh add addbmm addcdiv addcmul addmm
addmv all amax amin aminmax any argmax argmin argsort as_strided asin asinh atan atan2 atanh baddbmm block_diag bmm
broadcast_tensors broadcast_to bucketize cat ceil chunk clamp clamp_max clamp_min clone column_stack constant_pad_nd
contiguous copysign cos cosh cross cummax cumprod cumsum deg2rad diag_embed diagonal diagonal_scatter diff div dot
dstack einsum eq erf erfc erfinv exp exp2 expand expand_as expm1 fill flatten flip fliplr float float_power floor
floor_divide fmax fmin fmod frac full_like gather ge gt heaviside hstack hypot index_add index_copy index_fill
index_put index_select inner int isclose isfinite isinf isnan kron le lerp lgamma linalg.norm linalg.vector_norm log
log10 log1p log2 log_softmax logaddexp logcumsumexp logical_and logical_not logical_or logical_xor logit logsumexp
long lt masked_fill matmul max maximum mean meshgrid min minimum mm movedim mul mv nan_to_num narrow ne neg new_full
new_ones new_zeros nn.functional.adaptive_avg_pool1d nn.functional.adaptive_avg_pool2d
nn.functional.adaptive_avg_pool3d nn.functional.adaptive_max_pool1d nn.functional.adaptive_max_pool2d
nn.functional.adaptive_max_pool3d nn.functional.avg_pool1d nn.functional.avg_pool2d nn.functional.avg_pool3d
nn.functional.batch_norm nn.functional.bilinear nn.functional.celu nn.functional.channel_shuffle nn.functional.conv1d
nn.functional.conv2d nn.functional.conv3d nn.functional.conv_transpose1d nn.functional.conv_transpose2d
nn.functional.conv_transpose3d nn.functional.cosine_similarity nn.functional.elu nn.functional.embedding
nn.functional.gelu nn.functional.glu nn.functional.grid_sample nn.functional.group_norm nn.functional.hardshrink
nn.functional.hardsigmoid nn.functional.hardswish nn.functional.hardtanh nn.functional.instance_norm
nn.functional.interpolate nn.functional.layer_norm nn.functional.leaky_relu nn.functional.linear
nn.functional.local_response_norm nn.functional.logsigmoid nn.functional.max_pool1d nn.functional.max_pool2d
nn.functional.max_pool3d nn.functional.mish nn.functional.multi_head_attention_forward nn.functional.normalize
nn.functional.pad nn.functional.pixel_shuffle nn.functional.pixel_unshuffle nn.functional.prelu nn.functional.relu
nn.functional.relu6 nn.functional.rms_norm nn.functional.rrelu nn.functional.scaled_dot_product_attention
nn.functional.selu nn.functional.silu nn.functional.softmin nn.functional.softplus nn.functional.softshrink
nn.functional.softsign nn.functional.tanhshrink nn.functional.threshold nn.functional.unfold
nn.functional.upsample_bilinear nn.functional.upsample_nearest norm ones_like outer permute positive pow prod rad2deg
ravel reciprocal remainder repeat repeat_interleave reshape reshape_as roll rot90 round rsqrt rsub scatter scatter_add
scatter_reduce searchsorted select select_scatter sgn sigmoid sign sin sinc sinh slice slice_scatter softmax sort
split split_with_sizes sqrt square squeeze stack std std_mean sub sum t take take_along_dim tan tanh tensor_split
tensordot tile to topk trace transpose tril triu true_divide trunc unbind unflatten unfold unsqueeze var var_mean view
view_as vstack where xlogy zeros_like
"""
OPERATORS = _LISTED.split()


class _Sample(nn.Module):
    """An operator with its constants, as a network that takes tensors alone."""

    def __init__(self, operator: Callable[..., Any], leaves: list[Any], tree: Any, places: list[int]) -> None:
        super().__init__()
        self._operator, self._tree, self._places = operator, tree, places
        self._leaves: list[Any] = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self._buffers_of = {}
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor) and place not in places:
                self._buffers_of[place] = f"constant_{place}"
                self.register_buffer(f"constant_{place}", leaf.clone())

    def forward(self, *inputs: torch.Tensor) -> Any:
        leaves = list(self._leaves)
        for place, name in self._buffers_of.items():
            leaves[place] = getattr(self, name)
        for place, value in zip(self._places, inputs, strict=True):
            leaves[place] = value
        args, kwargs = pytree.tree_unflatten(leaves, self._tree)
        return self._operator(*args, **kwargs)


@functools.cache
def _database() -> dict[str, list[Any]]:
    from torch.testing._internal.common_methods_invocations import op_db

    named: dict[str, list[Any]] = {}
    for entry in op_db:
        named.setdefault(entry.name, []).append(entry)
    return named


@functools.lru_cache(maxsize=4)
def _samples(operator: str, count: int) -> list[Any]:
    """The first ``count`` samples of an operator, of all its variants; rank 0 to 5, float32."""
    torch.manual_seed(0)
    found: list[Any] = []
    for entry in _database().get(operator, []):
        if torch.float32 not in entry.dtypes:
            continue
        samples = entry.sample_inputs("cpu", torch.float32, requires_grad=False)
        found += [(entry, sample) for sample in itertools.islice(samples, count - len(found))]
    return found


def cases(pattern: str, count: int, all_inputs: bool) -> list[tuple[str, str]]:
    """Pairs of a case, ``softmax/2``, and its operator."""
    suffix = "/inputs" if all_inputs else ""
    chosen = [name for name in OPERATORS if re.fullmatch(pattern, name)]
    return [(f"{name}/{index}{suffix}", name) for name in chosen for index in range(len(_samples(name, count)))]


def network(case: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """A case as a network and its inputs."""
    operator, index, *form = case.split("/")
    entry, sample = _samples(operator, max(SAMPLES, int(index) + 1))[int(index)]
    call = ((sample.input, *sample.args), dict(sample.kwargs))
    leaves, tree = pytree.tree_flatten(call)
    first = len(pytree.tree_leaves(sample.input))
    tensors = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    places = tensors if form else [place for place in tensors if place < first]
    module = _Sample(entry.op, leaves, tree, places)
    return module.eval(), tuple(leaves[place].detach().clone() for place in places)


def _saved(program: torch.export.ExportedProgram, path: Path) -> Path | torch.export.ExportedProgram:
    """The program's file; PyTorch cannot write one whose result is a named tuple of its own, which stays in memory."""
    try:
        torch.export.save(program, path)
    except NotImplementedError:
        return program
    return path


def attempt(case: str, folder: Path, build: bool) -> None:
    """Export, build, run and compare one case; see ``pool.Attempt``."""
    warnings.simplefilter("ignore")
    module, inputs = network(case)
    with torch.no_grad():
        try:
            wanted = [value for value in pytree.tree_leaves(module(*copy.deepcopy(inputs))) if value is not None]
            program = torch.export.export(module, copy.deepcopy(inputs))
        except Exception as problem:
            raise SkippedError(f"PyTorch does not export it: {str(problem).splitlines()[0]}") from problem
    model = _saved(program, folder / "sample.pt2")
    if not build:
        import_model(model)
        return
    found = outputs(model, [value.numpy() for value in inputs], folder)
    assert len(found) == len(wanted), f"{len(found)} outputs in place of {len(wanted)}"
    for array, value in zip(found, wanted, strict=True):
        require_equal(array, torch.as_tensor(value).numpy(), RELATIVE, ABSOLUTE)


def main() -> int:
    """Run the suite and write what became of each case."""
    options = suite_options(__doc__)
    options.add_argument("--samples", type=int, default=SAMPLES, help="of each operator")
    options.add_argument("--all-inputs", action="store_true", help="every tensor of a sample is an input")
    chosen = options.parse_args()
    listed = cases(chosen.only or ".*", chosen.samples, chosen.all_inputs)
    return run_command("benchmarks.conformance.opinfo", "PyTorch OpInfo", listed, chosen, ("torch", "apache-tvm"))


if __name__ == "__main__":
    sys.exit(main())
