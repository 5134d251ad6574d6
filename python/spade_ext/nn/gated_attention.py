"""MEGA's moving average equipped gated attention."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, silu

from .ema import EMA
from .linear import Linear
from .mask import real_token, real_tokens
from .norm import Norm, build_norm
from .position import SimpleBias, build_position_bias
from .reach import Reach, Ring

State = tuple[Tensor, Ring]  # of the moving average (B, D, n_dim), and the ring of keys and values


class GatedAttention(Reach):
    """One head of attention within chunks, whose queries, keys and gates come from a moving average of the input.

    With x~ = norm(x) before and m = EMA(x~)::

        v = silu(W_v x~)                            (E)
        u, z, r, g = W_m m                          (D, Z, E, D), then sigmoid(u), silu(z), silu(r)
        q, k = gamma z + beta                       (Z) each
        h = silu(g + W_h (r * attention(q, k, v)))
        y = x + u * (h - x)

    Args:
        d_model: width D.
        z_dim: width Z of queries and keys; even for the "rotary" position.
        h_dim: width E of values.
        n_dim: moving averages a channel, see `EMA`.
        chunk_size: tokens of a chunk; the grid starts at the first real token. None is the whole row, or
        window: (left, right), tokens that a token sees before and after itself; softmax only.
        causal: no token sees a later one; the moving average has one direction instead of two.
        activation: of the scores, "softmax", "relu2" or "laplace", see `spade_ext.ops.local_attention`.
        position: the relative position bias, "simple" or "rotary".
        norm: "layernorm", "rmsnorm" or "scalenorm"; None leaves it to the caller of `update`.
        prenorm: normalise the input; otherwise the output.
        truncation: longest reach of the moving average in tokens, see `EMA`.
        max_positions: longest document of the "simple" position without chunks, from its first real token to its last;
            chunks need no more than chunk_size.
        dropout: of the values, the moving average and h.

    Source: MEGA (arXiv 2209.10655), section 3.
    """

    def __init__(
        self,
        d_model: int,
        z_dim: int,
        h_dim: int,
        n_dim: int,
        *,
        chunk_size: int | None = None,
        window: tuple[int, int] | None = None,
        causal: bool = False,
        activation: Literal["softmax", "relu2", "laplace"] = "softmax",
        position: Literal["simple", "rotary"] = "simple",
        norm: Norm | None = "layernorm",
        prenorm: bool = True,
        truncation: int | None = None,
        max_positions: int = 1024,
        dropout: float = 0.0,
    ):
        super().__init__()
        for name, size in {"d_model": d_model, "z_dim": z_dim, "h_dim": h_dim}.items():
            if size < 1:
                raise ValueError(f"{name} is {size}, expected at least 1")
        if activation not in ("softmax", "relu2", "laplace"):
            raise ValueError(f"activation is {activation!r}, expected 'softmax', 'relu2' or 'laplace'")
        if position not in ("simple", "rotary"):
            raise ValueError(f"position is {position!r}, expected 'simple' or 'rotary'")
        self.set_reach(window, chunk_size, causal)
        if window is not None and activation != "softmax":
            raise ValueError(f"window is {window}, expected None for activation {activation!r}")
        self.d_model, self.z_dim, self.h_dim = d_model, z_dim, h_dim
        self.activation, self.prenorm = activation, prenorm
        self.norm = nn.Identity() if norm is None else build_norm(norm, d_model)
        self.ema = EMA(d_model, n_dim, bidirectional=not self.causal, truncation=truncation)
        self.v_proj = Linear(d_model, h_dim)
        self.mx_proj = Linear(d_model, z_dim + h_dim + 2 * d_model)
        self.h_proj = Linear(h_dim, d_model)
        self.gamma = nn.Parameter(torch.empty(2, z_dim))  # of queries, of keys
        self.beta = nn.Parameter(torch.empty(2, z_dim))
        reach = chunk_size or (max(window) + 1 if window else max_positions)
        self.position = build_position_bias(position, 1, max_positions=reach, dim=z_dim)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights, gamma and the position bias normal with standard deviation 0.02, the rest of attention 0."""
        for linear in (self.v_proj, self.mx_proj, self.h_proj):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        nn.init.normal_(self.gamma, std=0.02)
        nn.init.zeros_(self.beta)
        self.position.reset_parameters()

    def parameter_options(self) -> dict[str, dict[str, Any]]:
        """Optimizer options by parameter: no weight decay on the scale and the shift of queries and keys."""
        return {"gamma": {"weight_decay": 0.0}, "beta": {"weight_decay": 0.0}}

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        state: State | None = None,
    ) -> Tensor | tuple[Tensor, State]:
        """Mix the tokens of each row.

        Args:
            x: (B, L, D).
            attention_mask: (B, L), True or 1 at real tokens.
            segment_ids: (B, L), ints, equal within a document of a packed row; it sees itself only. Not with a state.
            state: of the tokens before; not changed. Padding then is at the ends of rows. See `initial_state`.

        Returns:
            (B, L, D), the residual connection included. What it holds at padded tokens means nothing. Where a state
            is given, also the state after each row's last real token.

        Raises:
            ValueError, TypeError: a shape or dtype that does not fit; a document longer than max_positions; a state
            for a two-sided layer or a truncated average.
        """
        if x.dim() != 3 or x.size(-1) != self.d_model:
            raise ValueError(f"x has shape {list(x.shape)}, expected (B, L, {self.d_model})")
        mask, normed = real_tokens(attention_mask, x), self.norm(x) if self.prenorm else x
        if state is None:
            return self.residual(x, self.update(normed, x, mask, segment_ids))
        update, state = self.update(normed, x, mask, segment_ids, state)
        return self.residual(x, update), state

    @torch.no_grad()
    def step(self, x: Tensor, state: State, attention_mask: Tensor | None = None) -> Tensor:
        """One token, x (B, D): returns y (B, D) and updates state in place. No gradient; not of whole rows.

        attention_mask: (B,), True or 1 at real tokens; what others leave in the state means nothing.
        """
        if x.dim() != 2 or x.size(-1) != self.d_model:
            raise ValueError(f"x has shape {list(x.shape)}, expected (B, {self.d_model})")
        normed = self.norm(x) if self.prenorm else x
        return self.residual(x, self.update_token(normed, x, state, real_token(attention_mask, x)))

    def residual(self, x: Tensor, update: Tensor) -> Tensor:
        return x + update if self.prenorm else self.norm(x + update)

    def update(
        self, normed: Tensor, x: Tensor, mask: Tensor | None, segment_ids: Tensor | None, state: State | None = None
    ) -> Tensor | tuple[Tensor, State]:
        """What the residual connection adds to x, u * (h - x), of x~ = normed, both (B, L, D)."""
        if state is None:
            m, ring = self.ema(normed, mask, segment_ids), None
        else:
            self.check_goes_on(segment_ids)
            average, ring = state
            m, average = self.ema(normed, mask, state=average)
        u, q, k, v, r, g = self.projections(normed, m)
        k, v, length = k[..., None, :], v[..., None, :], x.size(1)
        if ring is not None:
            k, v, mask, ring = self.continue_ring(ring, k, v, mask)
        bias = self.position_bias(length, k, mask, segment_ids)
        attended = self.attend(q[..., None, :], k, v, bias, attention_mask=mask, segment_ids=segment_ids).squeeze(-2)
        y = self.gated(x, attended, u, r, g)
        return y if state is None else (y, (average, ring))

    def update_token(self, normed: Tensor, x: Tensor, state: State, real: Tensor | None) -> Tensor:
        """`update` of one token, (B, D), the state in place."""
        self.check_has_steps()
        average, ring = state
        u, q, k, v, r, g = self.projections(normed, self.ema.step(normed, average, real))
        bias = self.position_bias(1, ring[0])
        attended = self.attend_token(q[:, None], k[:, None], v[:, None], bias, ring, real).squeeze(1)
        return self.gated(x, attended, u, r, g)

    def projections(self, normed: Tensor, m: Tensor) -> tuple[Tensor, ...]:
        """u, q, k, v, r and g, (..., their width), of x~ and m (..., D)."""
        v = self.dropout(silu(self.v_proj(normed)))
        widths = [self.d_model, self.z_dim, self.h_dim, self.d_model]
        u, z, r, g = self.mx_proj(self.dropout(m)).split(widths, dim=-1)
        # Under autocast gamma and beta are wider than z, and a ring is not.
        q, k = (silu(z)[..., None, :] * self.gamma + self.beta).to(z.dtype).unbind(-2)
        return u, q, k, v, r, g

    def gated(self, x: Tensor, attended: Tensor, u: Tensor, r: Tensor, g: Tensor) -> Tensor:
        h = self.dropout(silu(g + self.h_proj(silu(r) * attended)))
        return u.sigmoid() * (h - x)

    def position_bias(
        self, queries: int, k: Tensor, mask: Tensor | None = None, segment_ids: Tensor | None = None
    ) -> Tensor | None:
        """The table of k's dtype for the last `queries` tokens of k (B, Lk, 1, Z): (1, queries + Lk - 1), of chunks
        (1, 2 chunk_size - 1), or that of the window; None without tokens."""
        if self.window is not None:
            return self.position(*self.window).to(k.dtype)
        if k.size(1) == 0 or queries == 0:
            return None
        reach = [self.chunk_size or k.size(1), self.chunk_size or queries]  # tokens back and ahead, itself included
        numbered = reach
        if isinstance(self.position, SimpleBias) and max(reach) > (most := self.position.max_positions):
            if (longest := longest_document(k, mask, segment_ids)) > most:
                raise ValueError(f"a document has {longest} tokens, expected at most max_positions = {most}")
            numbered = [min(size, most) for size in reach]
        table = self.position(numbered[0] - 1, numbered[1] - 1).to(k.dtype)
        return pad(table, (reach[0] - numbered[0], reach[1] - numbered[1]))  # offsets that no document has

    def initial_state(self, batch_size: int) -> State:
        """That before the first token: of a window and of chunks its size is constant, of whole rows it grows."""
        ring = self.initial_ring(batch_size, (1, self.z_dim), (1, self.h_dim), self.v_proj.weight)
        return self.ema.initial_state(batch_size), ring

    def extra_repr(self) -> str:
        return (
            f"d_model={self.d_model}, z_dim={self.z_dim}, h_dim={self.h_dim}, window={self.window}, "
            f"chunk_size={self.chunk_size}, causal={self.causal}, activation={self.activation!r}, "
            f"prenorm={self.prenorm}"
        )


def longest_document(x: Tensor, mask: Tensor | None, segment_ids: Tensor | None) -> int:
    """Tokens of x (B, L, ...) from a document's first real one to its last, where they are most."""
    L = x.size(1)
    t = torch.arange(L, device=x.device).expand(x.shape[:2])
    padding = torch.zeros_like(t, dtype=torch.bool) if mask is None else ~mask
    document = torch.zeros_like(t)
    if segment_ids is not None:
        document[:, 1:] = (segment_ids[:, 1:] != segment_ids[:, :-1]).cumsum(1)
    first = torch.full_like(t, L).scatter_reduce(1, document, t.masked_fill(padding, L), "amin")
    last = torch.full_like(t, -1).scatter_reduce(1, document, t.masked_fill(padding, -1), "amax")
    return max((last - first + 1).amax(1).tolist(), default=0)
