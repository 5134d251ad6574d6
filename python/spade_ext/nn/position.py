"""Position biases: tables over the distance of key and query that local attention adds to its scores."""

import math
from typing import Any, Literal

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


class LearnedBias(nn.Module):
    """What the biases with parameters share: where those start, and that they do not decay."""

    def reset_parameters(self) -> None:
        """Normal with standard deviation 0.02."""
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)

    def parameter_options(self) -> dict[str, dict[str, Any]]:
        """Optimizer options by parameter: no weight decay."""
        return {name: {"weight_decay": 0.0} for name, _ in self.named_parameters()}


class RelativePositionBias(LearnedBias):
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

    def forward(self, left: int, right: int) -> Tensor:
        """The table (H, left + right + 1) for a window; buckets are one-sided when right is 0."""
        offsets = torch.arange(-left, right + 1, device=self.weight.device)
        buckets = relative_position_buckets(
            offsets, bidirectional=right > 0, num_buckets=self.num_buckets, max_distance=self.max_distance
        )
        return self.weight[buckets].T

    def extra_repr(self) -> str:
        return f"n_heads={self.weight.size(1)}, num_buckets={self.num_buckets}, max_distance={self.max_distance}"


def alibi_slopes(n_heads: int) -> list[float]:
    """2^(-8 h / n), h from 1 to n, for a power of two n.

    Other numbers of heads take the slopes of the power of two below, then every other one of the power above.
    """
    below = 2 ** (n_heads.bit_length() - 1)
    slopes = [2 ** (-8 * h / below) for h in range(1, below + 1)]
    between = [2 ** (-4 * h / below) for h in range(1, 2 * below, 2)]
    return slopes + between[: n_heads - below]


class AlibiBias(nn.Module):
    """ALiBi: a fixed slope a head times the distance, nothing learned.

    Args:
        n_heads: number of heads H.

    Source: ALiBi (arXiv 2108.12409), section 3; a two-sided window has the same slope on both sides.
    """

    def __init__(self, n_heads: int):
        super().__init__()
        if n_heads < 1:
            raise ValueError(f"n_heads is {n_heads}, expected at least 1")
        self.n_heads = n_heads
        # Empty: it carries the device and the dtype. Slopes in a buffer would be lost between meta and to_empty.
        self.register_buffer("like", torch.empty(0), persistent=False)

    def reset_parameters(self) -> None:
        """There are none."""

    def forward(self, left: int, right: int) -> Tensor:
        """The table (H, left + right + 1) for a window, -slope |r|."""
        offsets = torch.arange(-left, right + 1, dtype=torch.float64, device=self.like.device)
        slopes = torch.tensor(alibi_slopes(self.n_heads), dtype=torch.float64, device=self.like.device)
        return (-slopes[:, None] * offsets.abs()).to(self.like.dtype)

    def extra_repr(self) -> str:
        return f"n_heads={self.n_heads}"


class SimpleBias(LearnedBias):
    """MEGA's simple relative bias: one learned number an offset and head.

    Args:
        n_heads: number of heads H.
        max_positions: offsets from -(max_positions - 1) to max_positions - 1 have a number.

    Source: MEGA (arXiv 2209.10655) and its published code.
    """

    def __init__(self, n_heads: int, max_positions: int):
        super().__init__()
        if max_positions < 1:
            raise ValueError(f"max_positions is {max_positions}, expected at least 1")
        self.max_positions = max_positions
        self.weight = nn.Parameter(torch.empty(n_heads, 2 * max_positions - 1))
        self.reset_parameters()

    def forward(self, left: int, right: int) -> Tensor:
        """The table (H, left + right + 1) for a window, whose sides are both below max_positions."""
        if (reach := max(left, right)) >= self.max_positions:
            raise ValueError(
                f"a token sees others {reach} tokens away, expected fewer than max_positions = {self.max_positions}"
            )
        return self.weight[:, self.max_positions - 1 - left : self.max_positions + right]

    def extra_repr(self) -> str:
        return f"n_heads={self.weight.size(0)}, max_positions={self.max_positions}"


def frequencies(n: int, device: torch.device) -> Tensor:
    """n angles a token, 1 to almost 1 / 10000, in float64."""
    return 10000 ** (-torch.arange(n, dtype=torch.float64, device=device) / n)


def rotate(x: Tensor, places: Tensor | None = None) -> Tensor:
    """Rotary embedding: coordinates i and i + D / 2 of x (B, L, H, D), D even, turned by the token's place in its row.

    places: (B, L), 0 to L - 1 unless given.

    Products of rotated queries and keys depend on their distance alone, so that padding and packing change nothing.

    Source: RoFormer (arXiv 2104.09864), with the pairs of GPT-NeoX.
    """
    if places is None:
        places = torch.arange(x.size(1), device=x.device)
    angles = places.double()[..., None, None] * frequencies(x.size(-1) // 2, x.device)  # ([B,] L, 1, D / 2)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class RotaryBias(LearnedBias):
    """MEGA's rotary bias: the product of two learned vectors a head, rotated to the query's and the key's position.

    It is added to the scores, unlike rotary embeddings, which rotate queries and keys.

    Args:
        n_heads: number of heads H.
        dim: size of the vectors; even.

    Source: MEGA (arXiv 2209.10655) and its published code.
    """

    def __init__(self, n_heads: int, dim: int):
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"dim is {dim}, expected an even number of at least 2")
        self.alpha = nn.Parameter(torch.empty(n_heads, dim))
        self.beta = nn.Parameter(torch.empty(n_heads, dim))
        self.reset_parameters()

    def forward(self, left: int, right: int) -> Tensor:
        """The table (H, left + right + 1) for a window; halves of a vector are the two coordinates that rotate."""
        a1, a2 = self.alpha.chunk(2, dim=-1)
        b1, b2 = self.beta.chunk(2, dim=-1)
        offsets = torch.arange(-left, right + 1, dtype=torch.float64, device=self.alpha.device)
        angles = frequencies(a1.size(-1), offsets.device)[:, None] * offsets  # (dim / 2, left + right + 1)
        cos, sin = angles.cos().to(self.alpha.dtype), angles.sin().to(self.alpha.dtype)
        return (a1 * b1 + a2 * b2) @ cos + (a2 * b1 - a1 * b2) @ sin

    def extra_repr(self) -> str:
        return f"n_heads={self.alpha.size(0)}, dim={self.alpha.size(1)}"


Position = Literal["t5", "alibi", "simple", "rotary"]


def build_position_bias(
    position: Position | None,
    n_heads: int,
    *,
    max_positions: int,
    dim: int,
    num_buckets: int = 32,
    max_distance: int = 128,
) -> nn.Module | None:
    """The module that a name stands for: max_positions is of "simple", dim of "rotary", the last two are of "t5"."""
    builders = {
        "t5": lambda: RelativePositionBias(n_heads, num_buckets=num_buckets, max_distance=max_distance),
        "alibi": lambda: AlibiBias(n_heads),
        "simple": lambda: SimpleBias(n_heads, max_positions),
        "rotary": lambda: RotaryBias(n_heads, dim),
        None: lambda: None,
    }
    if position not in builders:
        raise ValueError(f"position is {position!r}, expected 't5', 'alibi', 'simple', 'rotary' or None")
    return builders[position]()


def row_table(position: nn.Module, queries: int, keys: int, *, causal: bool) -> Tensor | None:
    """The table (H, queries + keys - 1) of the last `queries` of `keys` tokens, 0 at offsets that no query sees.

    None without queries or keys.
    """
    if queries == 0 or keys == 0:
        return None
    if causal:
        return nn.functional.pad(position(keys - 1, 0), (0, queries - 1))
    return position(keys - 1, queries - 1)
