"""Normalisations over the width of each token, chosen by name."""

from typing import Any, Literal

import torch
from torch import Tensor, nn


class ScaleNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) over the last dimension, times one learned number.

    Source: the published code of MEGA (arXiv 2209.10655), which takes the mean where arXiv 1910.05895 has the sum.
    """

    def __init__(self, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def parameter_options(self) -> dict[str, dict[str, Any]]:
        """Optimizer options by parameter: no weight decay."""
        return {"weight": {"weight_decay": 0.0}}

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * nn.functional.rms_norm(x, x.shape[-1:], eps=self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


Norm = Literal["layernorm", "rmsnorm", "scalenorm"]


def build_norm(norm: Norm, d_model: int, eps: float = 1e-5) -> nn.Module:
    """The module that a name stands for, over a last dimension of d_model."""
    builders = {
        "layernorm": lambda: nn.LayerNorm(d_model, eps=eps),
        "rmsnorm": lambda: nn.RMSNorm(d_model, eps=eps),
        "scalenorm": lambda: ScaleNorm(eps),
    }
    if norm not in builders:
        raise ValueError(f"norm is {norm!r}, expected 'layernorm', 'rmsnorm' or 'scalenorm'")
    return builders[norm]()
