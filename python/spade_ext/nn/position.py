"""Position biases: tables over the distance of key and query that local attention adds to its scores."""

import math
from typing import Any

import torch
from torch import Tensor, nn


def relative_position_buckets(offsets: Tensor, *, bidirectional: bool, num_buckets: int, max_distance: int) -> Tensor:
    """The T5 bucket of each offset (key position minus query position), in [0, num_buckets).

    Half the buckets hold one distance each, the others grow logarithmically up to `max_distance`, the last holds
    the rest. Bidirectional: the upper half of the buckets is for keys after the query; otherwise such keys share
    bucket 0.

    Source: T5 (arXiv 1910.10683), section 2.1.
    """
    if bidirectional:
        num_buckets //= 2
        first = (offsets > 0).long() * num_buckets
        distance = offsets.abs()
    else:
        first = torch.zeros_like(offsets)
        distance = (-offsets).clamp(min=0)
    exact = num_buckets // 2
    # float32 decides which bucket an edge falls into: checkpoints depend on it.
    growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    logarithmic = (exact + (growth * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
    return first + torch.where(distance < exact, distance, logarithmic)


class RelativePositionBias(nn.Module):
    """T5's relative position bias: one learned number a bucket of distances and head.

    Args:
        n_heads: number of heads H.
        num_buckets: rows of the table; even, at least 4.
        max_distance: distance, in tokens, from which all share the last bucket; at least num_buckets.

    Source: T5 (arXiv 1910.10683), section 2.1; SPADE (arXiv 2212.08136) uses 32 buckets up to distance 128.
    """

    def __init__(self, n_heads: int, *, num_buckets: int = 32, max_distance: int = 128):
        super().__init__()
        if num_buckets < 4 or num_buckets % 2:
            raise ValueError(f"num_buckets is {num_buckets}, expected an even number of at least 4")
        if max_distance < num_buckets:
            raise ValueError(f"max_distance is {max_distance}, expected at least num_buckets = {num_buckets}")
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.weight = nn.Parameter(torch.empty(num_buckets, n_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with standard deviation 0.02."""
        nn.init.normal_(self.weight, std=0.02)

    def parameter_options(self) -> dict[str, dict[str, Any]]:
        """Optimizer options by parameter: no weight decay."""
        return {"weight": {"weight_decay": 0.0}}

    def forward(self, left: int, right: int) -> Tensor:
        """The table (H, left + right + 1) for a window; buckets are one-sided when right is 0."""
        offsets = torch.arange(-left, right + 1, device=self.weight.device)
        buckets = relative_position_buckets(
            offsets, bidirectional=right > 0, num_buckets=self.num_buckets, max_distance=self.max_distance
        )
        return self.weight[buckets].T

    def extra_repr(self) -> str:
        return f"n_heads={self.weight.size(1)}, num_buckets={self.num_buckets}, max_distance={self.max_distance}"
