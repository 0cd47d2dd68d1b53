"""What only moves values is copied once, from where the values are; all else stays with its reader."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dance_tvm import build_network
from dance_tvm.artifact.folder import Artifact
from dance_tvm.schedules.cpu.copies import Piece


class Shifted(nn.Module):
    """Some channels from the frame before, some from the one behind, written by slices; then a pointwise layer."""

    def __init__(self, fold: int) -> None:
        super().__init__()
        self.fold, self.before, self.behind = fold, nn.Conv2d(3, 20, 3, padding=1), nn.Conv2d(20, 8, 1)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.before(frames))
        clips, fold = x.view(-1, 5, *x.shape[1:]), self.fold
        out = torch.zeros_like(clips)
        out[:, :-1, :fold] = clips[:, 1:, :fold]
        out[:, 1:, fold : 2 * fold] = clips[:, :-1, fold : 2 * fold]
        out[:, :, 2 * fold :] = clips[:, :, 2 * fold :]
        return self.behind(out.view_as(x))


class Joined(nn.Module):
    """Halves that part and meet, a pad around them, and axes that move."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv3d(3, 18, 3, padding=1), nn.Conv3d(9, 7, 1)
        self.last = nn.Conv3d(16, 4, (2, 3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept, taken = torch.relu(self.first(x)).chunk(2, 1)
        y = torch.cat((kept, self.second(taken)), 1)
        ringed = torch.cat((y[:, :, -1:], y, y[:, :, :1]), 2)
        return self.last(F.pad(ringed, (1, 2, 0, 1), value=0.5)).transpose(1, 2)


def _built(network: nn.Module, shape: tuple[int, ...], folder, threads: int = 1) -> Artifact:
    torch.manual_seed(0)
    built = build_network(
        network.eval(), folder / "a", target="host", example_inputs=(torch.randn(shape),), threads=threads
    )
    assert built.artifact.manifest.check.status == "passed"
    return built.artifact


def _operators(artifact: Artifact) -> list[str]:
    """Functions that are no layer's."""
    return [symbol for symbol, kernel in artifact.manifest.kernels.items() if kernel.kind == "other"]


@pytest.mark.parametrize("fold", [2, 3])
def test_a_shift_in_time_is_one_copy(tmp_path, fold):
    operators = _operators(_built(Shifted(fold), (5, 3, 24, 20), tmp_path))
    assert sum(symbol.startswith("copy_pieces") for symbol in operators) == 1
    assert not any("slice" in symbol or "concat" in symbol for symbol in operators)


def test_joins_and_pads_are_copied_in_their_place(tmp_path):
    operators = _operators(_built(Joined(), (1, 3, 4, 17, 13), tmp_path, threads=2))
    assert not any("slice" in symbol or "concat" in symbol or "pad" in symbol for symbol in operators), operators


def test_a_piece_seen_from_a_box_starts_where_the_box_does():
    piece = Piece.whole((4, 6), 0).shifted((0, 2)).within((1, 0), (3, 5))
    assert piece == Piece((0, 2), (2, 3), 0, 6, (6, 1))
    assert Piece.whole((4, 6), 0).within((4, 0), (5, 6)) is None


def test_axes_that_step_on_together_are_one_loop():
    assert Piece.whole((2, 3, 4), 0).loops((2, 3, 4)) == [(24, 1, 1)]
    half = Piece.whole((2, 3, 4), 0).within((0, 0, 0), (2, 3, 2))
    assert half.loops((2, 3, 2)) == [(6, 2, 4), (2, 1, 1)]
    assert half.by_runs((2, 3, 2))
    assert not Piece.whole((2, 3), 0).moved((1, 0)).by_runs((3, 2))
