"""MEGA's moving average: a diagonal state space model with real, damped states in each channel."""

import math

import torch
from torch import Tensor, nn

from ..ops import diagonal_kernel, diagonal_scan, diagonal_step, long_conv
from .state_space import StateSpaceLayer, parameter_dtype


class EMA(StateSpaceLayer):
    """A multi-dimensional damped exponential moving average with a residual, y = silu(ema(x) + omega x).

    In each channel ``h_t = q h_{t-1} + p beta x_t`` and ``ema(x)_t = sum_n gamma h_t / sqrt(N)`` over N dimensions,
    with ``p = sigmoid(delta)`` and ``q = 1 - p sigmoid(alpha)``.

    Args:
        d_model: width, the number of channels D.
        n_dim: dimensions N of a channel's state.
        bidirectional: a second average reads the sequence from its end; both see the token itself.
        truncation: tokens that an average reaches back, itself included; None is all of them.

    Padded tokens count as zeros in the average, omega x takes them as they are. Parameters stay float32 in a
    half-precision module; float64 is taken.

    Source: MEGA (arXiv 2209.10655), section 3.1.
    """

    def __init__(self, d_model: int, n_dim: int = 2, *, bidirectional: bool = False, truncation: int | None = None):
        super().__init__()
        for name, size in {"d_model": d_model, "n_dim": n_dim}.items():
            if size < 1:
                raise ValueError(f"{name} is {size}, expected at least 1")
        if truncation is not None and truncation < 1:
            raise ValueError(f"truncation is {truncation}, expected at least 1 or None")
        self.d_model, self.n_dim, self.bidirectional, self.truncation = d_model, n_dim, bidirectional, truncation

        dtype = parameter_dtype()
        rows = 2 * d_model if bidirectional else d_model  # forward channels, then reverse ones
        for name in ("delta", "alpha", "beta", "gamma"):
            self.register_parameter(name, nn.Parameter(torch.empty(rows, n_dim, dtype=dtype)))
        self.omega = nn.Parameter(torch.empty(d_model, dtype=dtype))
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        def normal(name: str, std: float) -> Tensor:
            return std * torch.randn(getattr(self, name).shape, device="cpu")

        sign = 1.0 - 2.0 * (torch.arange(self.n_dim, device="cpu") % 2)  # 1, -1, 1, ...
        values = {"delta": normal("delta", 0.2), "alpha": normal("alpha", 0.2), "beta": sign + normal("beta", 0.02)}
        return values | {"gamma": normal("gamma", 1.0), "omega": normal("omega", 1.0)}

    @property
    def state_size(self) -> tuple[int, int]:
        return (self.d_model, self.n_dim)

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        """log q (K D, N), the inputs' weights p beta (K D, N) and the outputs' gamma / sqrt(N) (1, K D, N)."""

        def coefficients() -> tuple[Tensor, Tensor, Tensor]:
            p = self.delta.sigmoid()
            # Where p sigmoid(alpha) rounds to 1, log q would be infinite.
            below_one = 1 - torch.finfo(self.dtype).eps / 2
            log_q = torch.log1p(-(p * self.alpha.sigmoid()).clamp(max=below_one))
            return log_q, p * self.beta, self.gamma[None] / math.sqrt(self.n_dim)

        return self.reuse("coefficients", coefficients)

    def convolution_kernel(self, length: int) -> Tensor:
        """The kernels (K D, length) of all channels, forward ones before reverse ones, from lag 0 to the truncation."""
        length = length if self.truncation is None else min(length, self.truncation)

        def kernel() -> Tensor:
            log_q, b, c = self.coefficients()
            return diagonal_kernel(log_q, b * c, None, length, disc=None).squeeze(0)

        return self.reuse(("kernel", length), kernel)

    def convolve(self, u: Tensor, kernel: Tensor, segment_ids: Tensor | None) -> Tensor:
        if not self.bidirectional:
            return long_conv(u.mT, kernel, self.omega, segment_ids=segment_ids).mT
        forward, reverse = kernel.chunk(2)
        skip = self.omega + reverse[:, :1].sum(-1)  # the sum: lag 0, none at length 0
        return long_conv(u.mT, forward, skip, reverse[:, 1:], segment_ids).mT

    @property
    def can_scan(self) -> bool:
        return self.truncation is None

    def advance(self, u: Tensor, state: Tensor | None, segment_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_q, b, c = self.coefficients()
        options = {"bidirectional": self.bidirectional, "segment_ids": segment_ids}
        y, state = diagonal_scan(u.mT, log_q, b, c, None, state, self.omega[None], disc=None, **options)
        return y.squeeze(1).mT, state

    def activate(self, y: Tensor, x: Tensor, u: Tensor) -> Tensor:
        return nn.functional.silu(y if u is x else y + self.omega * (x - u))

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        state: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run over a batch of sequences.

        Args:
            x: (B, L, D).
            attention_mask: (B, L), True or 1 at real tokens.
            segment_ids: (B, L), integers: a run of equal ids is a document of its own, which starts from a zero
                state; a row's first one from `state`.
            state: (B, D, N), the state before the first token; not changed. See `initial_state`.

        Returns:
            y (B, L, D) of x's dtype; where a state is given, also the state after each row's last real token.

        Raises:
            ValueError, TypeError: a shape or dtype that does not fit; a state for a two-sided or truncated layer.
        """
        return self.run(x, attention_mask, segment_ids, state)

    def advance_token(self, u: Tensor, state: Tensor) -> Tensor:
        log_q, b, c = self.coefficients()
        y = diagonal_step(u, log_q, b, c, None, state, disc=None).squeeze(1)
        return nn.functional.silu(y + self.omega * u)

    def prepare_steps(self) -> None:
        self.coefficients()

    def check_has_states(self) -> None:
        super().check_has_states()
        if self.truncation is not None:
            raise ValueError(f"truncation is {self.truncation}, expected None for a state, which a cut average lacks")

    def extra_repr(self) -> str:
        return (
            f"d_model={self.d_model}, n_dim={self.n_dim}, bidirectional={self.bidirectional}, "
            f"truncation={self.truncation}"
        )
