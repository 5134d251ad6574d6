"""The attention layer of SPADE: multi-head attention over a window."""

from typing import Literal

from torch import Tensor, nn

from ..ops import local_attention
from .mask import real_tokens
from .position import RelativePositionBias


class LocalAttention(nn.Module):
    """Multi-head self-attention in which a token sees `left` tokens before and `right` after it.

    Args:
        d_model: width D.
        n_heads: heads H; H divides D, scores are scaled by 1 / sqrt(D / H).
        window: (left, right) in tokens; right = 0 is causal.
        position: "t5" for a learned relative position bias of its own, None for none.
        num_buckets, max_distance: of the bias, see `RelativePositionBias`.

    Source: SPADE (arXiv 2212.08136), section 3.2.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        window: tuple[int, int],
        position: Literal["t5"] | None = "t5",
        num_buckets: int = 32,
        max_distance: int = 128,
    ):
        super().__init__()
        if n_heads < 1 or d_model % n_heads:
            raise ValueError(f"n_heads is {n_heads}, expected a divisor of d_model = {d_model}")
        if len(window) != 2 or not all(isinstance(side, int) and side >= 0 for side in window):
            raise ValueError(f"window is {window}, expected (left, right), both ints of 0 or more")
        if position not in ("t5", None):
            raise ValueError(f"position is {position!r}, expected 't5' or None")
        self.n_heads = n_heads
        self.window = tuple(window)
        self.q = nn.Linear(d_model, d_model, bias=False)
        self.k = nn.Linear(d_model, d_model, bias=False)
        self.v = nn.Linear(d_model, d_model, bias=False)
        self.o = nn.Linear(d_model, d_model, bias=False)
        self.position = (
            RelativePositionBias(n_heads, num_buckets=num_buckets, max_distance=max_distance) if position else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier uniform, of gain 1 / sqrt(2) for q, k and v."""
        for linear in (self.q, self.k, self.v):
            nn.init.xavier_uniform_(linear.weight, gain=2**-0.5)
        nn.init.xavier_uniform_(self.o.weight)
        if self.position is not None:
            self.position.reset_parameters()

    def position_bias(self) -> Tensor | None:
        """This layer's table (H, left + right + 1), which other layers may share."""
        return None if self.position is None else self.position(*self.window)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, position_bias: Tensor | None = None) -> Tensor:
        """x (B, L, D), attention_mask (B, L); position_bias (H, left + right + 1) replaces this layer's own."""
        if position_bias is None:
            position_bias = self.position_bias()
        q, k, v = (linear(x).unflatten(-1, (self.n_heads, -1)) for linear in (self.q, self.k, self.v))
        if position_bias is not None:
            position_bias = position_bias.to(q.dtype)
        out = local_attention(q, k, v, position_bias, window=self.window, attention_mask=real_tokens(attention_mask, x))
        return self.o(out.flatten(-2))

    def extra_repr(self) -> str:
        return f"n_heads={self.n_heads}, window={self.window}"
