"""The attention layer of SPADE: multi-head attention over a window."""

from torch import Tensor, nn

from ..ops import local_attention
from .mask import real_tokens
from .position import Position, build_position_bias


class LocalAttention(nn.Module):
    """Multi-head self-attention in which a token sees `left` tokens before and `right` after it.

    Args:
        d_model: width D.
        n_heads: heads H; H divides D, scores are scaled by 1 / sqrt(D / H).
        window: (left, right) in tokens; right = 0 is causal.
        position: the relative position bias, "t5", "alibi", "simple" or "rotary", or None for none. "simple" has a
            number for each offset in the window, "rotary" vectors of size D / H.
        num_buckets, max_distance: of "t5", see `RelativePositionBias`.

    Source: SPADE (arXiv 2212.08136), section 3.2.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        window: tuple[int, int],
        position: Position | None = "t5",
        num_buckets: int = 32,
        max_distance: int = 128,
    ):
        super().__init__()
        if d_model < 1:
            raise ValueError(f"d_model is {d_model}, expected at least 1")
        if n_heads < 1 or d_model % n_heads:
            raise ValueError(f"n_heads is {n_heads}, expected a divisor of d_model = {d_model}")
        if len(window) != 2 or not all(isinstance(side, int) and side >= 0 for side in window):
            raise ValueError(f"window is {window}, expected (left, right), both ints of 0 or more")
        self.d_model = d_model
        self.n_heads = n_heads
        self.window = tuple(window)
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.o = nn.Linear(d_model, d_model, bias=False)
        self.position = build_position_bias(
            position,
            n_heads,
            max_positions=max(window) + 1,
            dim=d_model // n_heads,
            num_buckets=num_buckets,
            max_distance=max_distance,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier uniform of each (D, D) projection, of gain 1 / sqrt(2) for q, k and v."""
        for weight in self.qkv.weight.chunk(3):
            nn.init.xavier_uniform_(weight, gain=2**-0.5)
        nn.init.xavier_uniform_(self.o.weight)
        if self.position is not None:
            self.position.reset_parameters()

    def position_bias(self) -> Tensor | None:
        """This layer's table (H, left + right + 1), which other layers may share."""
        return None if self.position is None else self.position(*self.window)

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        """Attend within the window.

        Args:
            x: (B, L, D).
            attention_mask: (B, L), True or 1 at real tokens.
            position_bias: (H, left + right + 1), replaces this layer's own.
            segment_ids: (B, L), ints; a token sees its own segment only.

        Returns:
            (B, L, D).
        """
        if x.dim() != 3 or x.size(-1) != self.d_model:
            raise ValueError(f"x has shape {list(x.shape)}, expected (B, L, {self.d_model})")
        if position_bias is None:
            position_bias = self.position_bias()
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).unbind(2)
        if position_bias is not None:
            position_bias = position_bias.to(q.dtype)
        out = local_attention(
            q,
            k,
            v,
            position_bias,
            window=self.window,
            attention_mask=real_tokens(attention_mask, x),
            segment_ids=segment_ids,
        )
        return self.o(out.flatten(-2))

    def extra_repr(self) -> str:
        return f"n_heads={self.n_heads}, window={self.window}"
