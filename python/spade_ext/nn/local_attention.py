"""The attention layer of SPADE: multi-head attention over a window."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..ops import local_attention, local_attention_step
from .mask import real_tokens
from .position import Position, build_position_bias, rotate, row_table

# The last left + 1 keys and values of each row, (B, left + 1, H, D / H), and how many tokens the row has had, (B,).
# Tensors that are cloned, moved, index_selected or saved like any others; see `spade_ext.ops.local_attention_step`.
State = tuple[Tensor, Tensor, Tensor]


def checked_reach(
    window: Sequence[int] | None, chunk_size: int | None, causal: bool
) -> tuple[tuple[int, int] | None, int | None]:
    """A layer's window and chunk_size, one of them or none.

    Raises:
        ValueError: they are no such sizes, both are given, or the window does not fit `causal`.
    """
    if window is not None:
        sides = window if isinstance(window, (tuple, list)) else ()
        if len(sides) != 2 or not all(isinstance(side, int) and side >= 0 for side in sides):
            raise ValueError(f"window is {window}, expected (left, right), both ints of 0 or more")
        if causal and window[1] > 0:
            raise ValueError(f"window is {window}, expected a right of 0, since causal is True")
        if chunk_size is not None:
            raise ValueError(f"chunk_size is {chunk_size}, expected None beside a window")
        window = tuple(window)
    if chunk_size is not None and not (isinstance(chunk_size, int) and chunk_size >= 1):
        raise ValueError(f"chunk_size is {chunk_size}, expected an int of at least 1, or None")
    return window, chunk_size


class LocalAttention(nn.Module):
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
        self.window, self.chunk_size = checked_reach(window, chunk_size, causal)
        self.causal = causal or (window is not None and window[1] == 0)
        self.dropout = dropout
        self.rope = position == "rope"
        if self.rope and d_model // n_heads % 2:
            raise ValueError(f"position is 'rope', expected another one for heads of odd width {d_model // n_heads}")
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.o = nn.Linear(d_model, d_model, bias=False)
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

    def position_bias(self, length: int | None = None) -> Tensor | None:
        """This layer's table, which other layers may share: (H, left + right + 1) or of a chunk (H, 2 chunk_size - 1);
        of rows of `length` tokens (H, 2 length - 1)."""
        if self.position is None:
            return None
        if self.window is not None:
            return self.position(*self.window)
        return row_table(self.position, self.chunk_size or length, causal=self.causal)

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        segment_ids: Tensor | None = None,
        state: State | None = None,
    ) -> Tensor | tuple[Tensor, State]:
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
        if position_bias is None:
            position_bias = self.position_bias(x.size(1))
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).unbind(2)
        mask = real_tokens(attention_mask, x)
        if state is not None:
            self.check_has_states()
            if segment_ids is not None:
                raise ValueError("segment_ids is given, expected None where a state is")
        if self.rope:
            places = None if state is None else state[2][:, None] + places_from_first(x, mask)
            q, k = rotate(q, places), rotate(k, places)
        if position_bias is not None:
            position_bias = position_bias.to(q.dtype)
        if state is not None:
            k, v, mask, state = continued(state, k, v, mask)
        out = self.attention(
            q,
            k,
            v,
            position_bias,
            window=self.window,
            chunk_size=self.chunk_size,
            causal=self.causal,
            attention_mask=mask,
            segment_ids=segment_ids,
            **self.dropout_options(),
        )
        y = self.o(out.flatten(-2))
        return y if state is None else (y, state)

    @torch.no_grad()
    def step(self, x: Tensor, state: State, position_bias: Tensor | None = None) -> Tensor:
        """One token, x (B, D): returns y (B, D) and updates state in place. No gradient."""
        self.check_has_states()
        if x.dim() != 2 or x.size(-1) != self.d_model:
            raise ValueError(f"x has shape {list(x.shape)}, expected (B, {self.d_model})")
        if position_bias is None:
            position_bias = self.position_bias()
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).unbind(1)
        keys, values, position = state
        if self.rope:
            q, k = (rotate(t[:, None], position[:, None]).squeeze(1) for t in (q, k))
        if position_bias is not None:
            position_bias = position_bias.to(q.dtype)
        out = local_attention_step(q, k, v, position_bias, keys, values, position)
        position += 1
        return self.o(out.flatten(-2))

    attention = staticmethod(local_attention)

    def dropout_options(self) -> dict[str, Any]:
        if self.dropout == 0 or not self.training:
            return {}
        return {"dropout_p": self.dropout, "dropout_seed": torch.randint(2**62, (), device="cpu")}

    def initial_state(self, batch_size: int) -> State:
        """That before the first token, of constant size however many follow; under autocast of the type of its keys."""
        self.check_has_states()
        device, dtype, left = self.qkv.weight.device, self.qkv.weight.dtype, self.window[0]
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        shape = batch_size, left + 1, self.n_heads, self.d_model // self.n_heads
        keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        return keys, values, torch.zeros(batch_size, dtype=torch.long, device=device)

    def check_has_states(self) -> None:
        if self.window is None or self.window[1] > 0:
            raise ValueError(f"window is {self.window}, expected (left, 0) for a state")

    def extra_repr(self) -> str:
        reach = {"window": self.window, "chunk_size": self.chunk_size, "causal": self.causal or None}
        return f"n_heads={self.n_heads}" + "".join(f", {name}={value}" for name, value in reach.items() if value)


def padding_before(mask: Tensor) -> Tensor:
    """(B, 1): tokens before a row's first real one, all of them where there is none."""
    return (mask.cumsum(1) == 0).sum(1, keepdim=True)


def places_from_first(x: Tensor, mask: Tensor | None) -> Tensor:
    """(B, L) of x (B, L, ...): 0 at a row's first real token, negative before it."""
    places = torch.arange(x.size(1), device=x.device).expand(x.shape[:2])
    return places if mask is None else places - padding_before(mask)


def continued(state: State, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, State]:
    """Keys and values (B, L, H, D) behind those of state, with the mask of both, and the state after them.

    A row's tokens have numbers, from 0; those of the state come right before the first real one of k and v.
    """
    keys, values, position = state
    B, size = keys.shape[:2]
    if k.shape != (B, k.size(1), *keys.shape[2:]) or keys.dtype != k.dtype:
        raise ValueError(
            f"state has keys {list(keys.shape)} of {keys.dtype}, expected [{k.size(0)}, {size}, {k.size(2)}, "
            f"{k.size(3)}] of {k.dtype}"
        )
    row = torch.arange(B, device=k.device)[:, None]
    real = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device) if mask is None else mask
    first = padding_before(real)
    count = real.sum(1, keepdim=True)
    place = torch.arange(size + k.size(1), device=k.device)
    number = position[:, None] + place - size - first  # (B, left + 1 + L)
    new = place >= size + first
    if not torch.equal(new & (place < size + first + count), new & pad(real, (size, 0))):
        raise ValueError("attention_mask has padding between real tokens, expected it at the ends of rows with a state")
    seen = (number >= 0) & (number >= position[:, None] - size) & (~new | pad(real, (size, 0)))
    source = torch.where(new, place, number % size)
    k, v = (torch.cat([old, t], dim=1)[row, source] for old, t in ((keys, k), (values, v)))

    after = position[:, None] + count
    last = after - 1 - (after - 1 - torch.arange(size, device=k.device)) % size  # number of the token of each slot
    held = (last - position[:, None] + size + first).clamp(min=0)
    return k, v, seen, (k[row, held], v[row, held], after.squeeze(1))
