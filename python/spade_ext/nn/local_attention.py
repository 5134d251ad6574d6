"""The attention layer of SPADE: multi-head attention over a window."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .linear import Linear
from .mask import real_token, real_tokens
from .position import Position, build_position_bias, rotate, row_table
from .reach import Reach, Ring, places_from_first


class LocalAttention(Reach):
    """Multi-head self-attention in which a token sees `left` tokens before and `right` after it.

    Args:
        d_model: width D.
        n_heads: heads H; H divides D, scores are scaled by 1 / sqrt(D / H).
        window: (left, right) in tokens; right = 0 is causal. None is the whole row, or
        chunk_size: a token sees its chunk of so many tokens; the grid starts at the first real token.
        causal: no token sees a later one, in a row or a chunk.
        position: the relative position bias, "t5", "alibi", "simple" or "rotary"; "rope", which rotates queries and
            keys; or None for none. "simple" has a number for each offset, "rotary" vectors of size D / H.
        num_buckets, max_distance: of "t5", see `RelativePositionBias`.
        max_positions: longest row of "simple" without a window and a chunk.
        dropout: of the attention's weights.

    Source: SPADE (arXiv 2212.08136), section 3.2.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        window: tuple[int, int] | None = None,
        chunk_size: int | None = None,
        causal: bool = False,
        position: Position | Literal["rope"] | None = "t5",
        num_buckets: int = 32,
        max_distance: int = 128,
        max_positions: int = 1024,
        dropout: float = 0.0,
    ):
        super().__init__()
        if d_model < 1:
            raise ValueError(f"d_model is {d_model}, expected at least 1")
        if not isinstance(n_heads, int) or n_heads < 1 or d_model % n_heads:
            raise ValueError(f"n_heads is {n_heads}, expected a divisor of d_model = {d_model}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}, expected 0 or more and less than 1")
        self.d_model = d_model
        self.n_heads = n_heads
        self.set_reach(window, chunk_size, causal)
        self.dropout = dropout
        self.rope = position == "rope"
        if self.rope and d_model // n_heads % 2:
            raise ValueError(f"position is 'rope', expected another one for heads of odd width {d_model // n_heads}")
        self.qkv = Linear(d_model, 3 * d_model, bias=False)
        self.o = Linear(d_model, d_model, bias=False)
        self.position = build_position_bias(
            None if self.rope else position,
            n_heads,
            max_positions=chunk_size or (max(window) + 1 if window else max_positions),
            dim=d_model // n_heads,
            num_buckets=num_buckets,
            max_distance=max_distance,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier uniform of each (D, D) projection, of gain 1 / sqrt(2) for q, k and v."""
        # As a whole: transformers marks loaded weights, not slices of them, to be left alone.
        bound = math.sqrt(1.5 / self.d_model)
        nn.init.uniform_(self.qkv.weight, -bound, bound)
        nn.init.xavier_uniform_(self.o.weight)
        if self.position is not None:
            self.position.reset_parameters()

    def position_bias(self, length: int | None = None, state: Ring | None = None) -> Tensor | None:
        """This layer's table, which other layers may share: (H, left + right + 1) or of a chunk (H, 2 chunk_size - 1);
        of rows of `length` tokens, behind those of a state, (H, length + tokens - 1)."""
        if self.position is None:
            return None
        if self.window is not None:
            return self.position(*self.window)
        if self.chunk_size is not None:
            return row_table(self.position, self.chunk_size, self.chunk_size, causal=self.causal)
        before = 0 if state is None else state[0].size(1)
        return row_table(self.position, length, before + length, causal=self.causal)

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        segment_ids: Tensor | None = None,
        state: Ring | None = None,
    ) -> Tensor | tuple[Tensor, Ring]:
        """Attend within the window, the chunk or the row.

        Args:
            x: (B, L, D).
            attention_mask: (B, L), True or 1 at real tokens.
            position_bias: like this layer's own, which it replaces.
            segment_ids: (B, L), ints; a token sees its own segment only. Not with a state.
            state: of the tokens before; not changed. Padding then is at the ends of rows. See `initial_state`.

        Returns:
            (B, L, D); where a state is given, also the state after each row's last real token.
        """
        if x.dim() != 3 or x.size(-1) != self.d_model:
            raise ValueError(f"x has shape {list(x.shape)}, expected (B, L, {self.d_model})")
        if state is not None:
            self.check_goes_on(segment_ids)
        if position_bias is None:
            position_bias = self.position_bias(x.size(1), state)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).unbind(2)
        mask = real_tokens(attention_mask, x)
        if self.rope:
            places = None if state is None else state[2][:, None] + places_from_first(x, mask)
            q, k = rotate(q, places), rotate(k, places)
        if position_bias is not None:
            position_bias = position_bias.to(q.dtype)
        if state is not None:
            k, v, mask, state = self.continue_ring(state, k, v, mask)
        tokens = {"attention_mask": mask, "segment_ids": segment_ids}
        y = self.o(self.attend(q, k, v, position_bias, **tokens, **self.dropout_options()).flatten(-2))
        return y if state is None else (y, state)

    @torch.no_grad()
    def step(
        self, x: Tensor, state: Ring, position_bias: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """One token, x (B, D): returns y (B, D) and updates state in place. No gradient; not of whole rows.

        attention_mask: (B,), True or 1 at real tokens; what others leave in the state means nothing.
        """
        self.check_has_steps()
        if x.dim() != 2 or x.size(-1) != self.d_model:
            raise ValueError(f"x has shape {list(x.shape)}, expected (B, {self.d_model})")
        if position_bias is None:
            position_bias = self.position_bias()
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).unbind(1)
        if self.rope:
            q, k = (rotate(t[:, None], state[2][:, None]).squeeze(1) for t in (q, k))
        if position_bias is not None:
            position_bias = position_bias.to(q.dtype)
        return self.o(self.attend_token(q, k, v, position_bias, state, real_token(attention_mask, x)).flatten(-2))

    def dropout_options(self) -> dict[str, Any]:
        if self.dropout == 0 or not self.training:
            return {}
        return {"dropout_p": self.dropout, "dropout_seed": torch.randint(2**62, (), device="cpu")}

    def initial_state(self, batch_size: int) -> Ring:
        """That before the first token: of a window and of chunks its size is constant, of whole rows it grows."""
        size = self.n_heads, self.d_model // self.n_heads
        return self.initial_ring(batch_size, size, size, self.qkv.weight)

    def extra_repr(self) -> str:
        reach = {"window": self.window, "chunk_size": self.chunk_size, "causal": self.causal or None}
        return f"n_heads={self.n_heads}" + "".join(f", {name}={value}" for name, value in reach.items() if value)
