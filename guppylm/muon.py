"""Muon, the optimizer of the layers' matrices (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    gradient -> momentum -> the nearest matrix that treats all directions alike -> a step

A gradient is mostly a few strong directions: what every conversation has in common. Adam, which scales each number by
itself, follows those; what only some conversations teach comes late. Muon makes all directions of an update equally
long, so that the rare is learnt beside the frequent. In training/LOG.md it needs less than half the conversations.

torch.optim.Muon takes the same steps, one matrix at a time and always in bf16. Here matrices of one shape go together,
in the precision that the processor multiplies fast.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

# One step takes each singular value s of a matrix (0 < s <= 1) to a s + b s^3 + c s^5; after five, all are near 1.
STEPS, A, B, C = 5, 3.4445, -4.7750, 2.0315


def orthogonalised(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrices (N, rows, columns), each with its singular values brought near 1 (0.7 to 1.2), computed in `dtype`."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.to(dtype)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # now none is above 1
    for _ in range(STEPS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=B, alpha=C), x, beta=A)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Takes matrices only. `lr` is the size of a step as AdamW means it: its root mean square is about 0.2 `lr`.
    `dtype`: bfloat16 where the hardware multiplies it fast."""

    def __init__(
        self, matrices: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float, dtype: torch.dtype
    ) -> None:
        self.dtype = dtype
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One step along the gradients."""
        for group in self.param_groups:
            same: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    same.setdefault(matrix.shape, []).append(
                        (matrix, self._ahead(matrix, matrix.grad, group["momentum"]))
                    )
            for shape, some in same.items():
                updates = orthogonalised(torch.stack([ahead for _, ahead in some]), self.dtype)
                size = 0.2 * group["lr"] * max(shape) ** 0.5
                for (matrix, _), update in zip(some, updates, strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-size)

    def _ahead(self, matrix: nn.Parameter, gradient: Tensor, momentum: float) -> Tensor:
        """Where the mean of the gradients will be after one more like this (Nesterov)."""
        state = self.state[matrix]
        if not state:
            state["momentum"] = torch.zeros_like(matrix)
        mean: Tensor = state["momentum"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(mean, momentum)
