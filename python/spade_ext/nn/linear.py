"""A Linear that is as fast for a token as its weight comes from memory."""

import math

import torch
from torch import Tensor, nn

from ..ops import linear_step

# The most rows for which the op is not slower than torch's Linear (benchmarks/linear_step.py).
ROWS_LIMIT = {torch.float64: 8, torch.float32: 8, torch.float16: 2, torch.bfloat16: 2}


def takes_step(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` is the op: eager, on the CPU, without autograd and autocast, for few rows of plain tensors."""
    return (
        not torch.is_grad_enabled()
        and x.is_cpu
        and not torch.compiler.is_compiling()
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and weight.stride(1) == 1
        and math.prod(x.shape[:-1]) <= ROWS_LIMIT.get(x.dtype, -1)
        and not torch.is_autocast_enabled("cpu")
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`; `spade_ext.ops.linear_step` for a few rows without gradients on the CPU."""
    if takes_step(x, weight):
        return linear_step(x, weight, bias)
    return nn.functional.linear(x, weight, bias)


class Linear(nn.Linear):
    """`torch.nn.Linear` by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
