"""Muon: an update treats all directions alike, and is torch's."""

from __future__ import annotations

import pytest
import torch

from guppylm.muon import Muon, orthogonalised


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (32, 32)])
def test_all_directions_of_an_update_are_nearly_equally_long(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    strong_and_weak = torch.logspace(0, -2, min(shape))
    left, right = (torch.linalg.qr(torch.randn(2, side, min(shape)))[0] for side in shape)
    made = orthogonalised(left * strong_and_weak @ right.mT, torch.float32)
    lengths = torch.linalg.svdvals(made)
    assert lengths.min() > 0.6
    assert lengths.max() < 1.3
    # The directions stay what they were.
    assert torch.allclose(
        (left.mT @ made @ right).diagonal(dim1=1, dim2=2).sort().values, lengths.sort().values, atol=1e-3
    )


def test_nothing_to_learn_moves_nothing() -> None:
    assert not orthogonalised(torch.zeros(1, 4, 8), torch.float32).any()


def test_it_takes_the_steps_of_torchs_muon() -> None:
    torch.manual_seed(0)
    begin = [torch.randn(24, 64), torch.randn(64, 24), torch.randn(24, 64)]
    ours, theirs = ([torch.nn.Parameter(matrix.clone()) for matrix in begin] for _ in range(2))
    mine = Muon(ours, lr=0.01, momentum=0.95, weight_decay=0.1, dtype=torch.bfloat16)
    peer = torch.optim.Muon(theirs, lr=0.01, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        mine.step()
        peer.step()  # type: ignore[no-untyped-call]
    for a, b, before in zip(ours, theirs, begin, strict=True):
        moved = (a - before).abs().max()
        assert (a - b).abs().max() < 0.01 * moved


def test_a_step_is_as_long_as_adamws() -> None:
    torch.manual_seed(0)
    matrix = torch.nn.Parameter(torch.zeros(96, 128))
    matrix.grad = torch.randn(96, 128)
    Muon([matrix], lr=0.01, momentum=0.95, weight_decay=0.0, dtype=torch.float32).step()
    assert matrix.detach().square().mean().sqrt() == pytest.approx(0.2 * 0.01, rel=0.2)
