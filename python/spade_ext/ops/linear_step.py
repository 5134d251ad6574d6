"""A Linear of few rows, as decoding has them."""

import torch
from torch import Tensor
from torch.nn.functional import linear


def linear_step(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""``x @ weight.T + bias`` for few rows of x, as fast as the weight comes from memory, without gradients.

    Args:
        x: (..., K), float64, float32, float16 or bfloat16, any strides.
        weight: (N, K), copied first where its rows are not contiguous.
        bias: (N,).

    Returns:
        (..., N), contiguous. Sums are in float32, or in float64, and rounded once; a row does not depend on the others.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit, named in one sentence.
        NotImplementedError: an argument requires a gradient while gradients are recorded.
    """
    return torch.ops.spade_ext.linear_step(x, weight, bias)


def linear_step_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear_step` by `torch.nn.functional.linear`."""
    return linear(x, weight, bias)
