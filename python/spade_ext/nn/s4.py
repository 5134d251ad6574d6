"""State space model layers: a long convolution whose kernel a linear state space model generates."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..ops import diagonal_kernel, long_conv
from .hippo import diagonal_state_matrix
from .mask import real_tokens


def complex_product(a: Tensor, b: Tensor) -> Tensor:
    """The product of complex numbers stored as real pairs (..., 2)."""
    return torch.view_as_real(torch.view_as_complex(a) * torch.view_as_complex(b))


class S4(nn.Module):
    """A state space model in each channel, x' = A x + B u, y = 2 Re(C x) + D u, run as a long convolution.

    Args:
        d_model: width, the number of channels H.
        d_state: size of a state; its N = d_state / 2 conjugate halves are stored. Even.
        kernel: "s4d", a diagonal A.
        init: eigenvalues of A: "legs", "lin", "inv", "quad" or "real".
        n_ssm: copies S of (A, B), a divisor of d_model; channel h uses copy h mod S. None is d_model.
        channels: outputs a channel, C.
        bidirectional: a second kernel reads the sequence from its end.
        disc: discretisation, "zoh", "bilinear" or "dss".
        dt_min, dt_max: range of the step, log-uniform, in units of time a token.
        lr: learning rate of A and B: None is the optimizer's own, 0 freezes them (they become buffers).

    Parameters stay float32 in a half-precision module; float64 is taken.

    Source: S4 (arXiv 2111.00396); S4D (arXiv 2206.11893).
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        *,
        kernel: Literal["s4d"],
        init: str = "legs",
        n_ssm: int | None = None,
        channels: int = 1,
        bidirectional: bool = False,
        disc: Literal["zoh", "bilinear", "dss"] = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        lr: float | None = None,
    ):
        super().__init__()
        n_ssm = d_model if n_ssm is None else n_ssm
        if kernel != "s4d":
            raise ValueError(f"kernel is {kernel!r}, expected 's4d'")
        if d_state < 2 or d_state % 2:
            raise ValueError(f"d_state is {d_state}, expected an even number of at least 2")
        if n_ssm < 1 or d_model % n_ssm:
            raise ValueError(f"n_ssm is {n_ssm}, expected a divisor of d_model = {d_model}")
        if channels < 1:
            raise ValueError(f"channels is {channels}, expected at least 1")
        if disc not in ("zoh", "bilinear", "dss"):
            raise ValueError(f"disc is {disc!r}, expected 'zoh', 'bilinear' or 'dss'")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"dt_min and dt_max are {dt_min} and {dt_max}, expected 0 < dt_min <= dt_max")
        self.d_model, self.d_state, self.n_ssm = d_model, d_state, n_ssm
        self.init, self.disc, self.dt_min, self.dt_max, self.lr = init, disc, dt_min, dt_max, lr
        self.channels, self.bidirectional = channels, bidirectional

        # Their own dtype, whatever the default one is: half-precision state space parameters diverge.
        dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
        S, H, N, C = n_ssm, d_model, d_state // 2, channels * (2 if bidirectional else 1)
        for name, shape in {"log_w_real": (S, N), "w_imag": (S, N), "B": (S, N, 2)}.items():
            value = torch.empty(shape, dtype=dtype)
            if lr == 0:
                self.register_buffer(name, value)
            else:
                self.register_parameter(name, nn.Parameter(value))
        self.C = nn.Parameter(torch.empty(C, H, N, 2, dtype=dtype))  # forward channels, then reverse ones
        self.log_dt = nn.Parameter(torch.empty(H, dtype=dtype))
        self.D = nn.Parameter(torch.empty(channels, H, dtype=dtype))
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        """Fresh values of every parameter and buffer: w by `init`, B = 1, C and D standard normal, dt log-uniform."""
        w = diagonal_state_matrix(self.init, self.d_state).expand(self.n_ssm, -1)
        low, high = math.log(self.dt_min), math.log(self.dt_max)
        one = torch.tensor([1.0, 0.0], device="cpu")
        return {
            "log_w_real": torch.log((-w.real).clamp(min=1e-4)),
            "w_imag": w.imag,
            "B": one.expand(self.B.shape),
            "C": math.sqrt(0.5) * torch.randn(self.C.shape, device="cpu"),
            "log_dt": low + (high - low) * torch.rand(self.log_dt.shape, device="cpu"),
            "D": torch.randn(self.D.shape, device="cpu"),
        }

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for name, value in self.initial_values().items():
            getattr(self, name).copy_(value)

    def parameter_options(self) -> dict[str, dict[str, Any]]:
        """Optimizer options by parameter: no weight decay on the dynamics, and A and B at `lr`."""
        state_matrix = {"weight_decay": 0.0} | ({"lr": self.lr} if self.lr else {})
        options = {
            "log_w_real": state_matrix,
            "w_imag": state_matrix,
            "B": state_matrix,
            "log_dt": {"weight_decay": 0.0},
        }
        own = dict(self.named_parameters(recurse=False))
        return {name: option for name, option in options.items() if name in own}

    def convolution_kernel(self, length: int, rate: float = 1.0) -> Tensor:
        """The kernels (C, H, length) of all channels, forward ones before reverse ones."""
        w = torch.stack((-self.log_w_real.exp(), self.w_imag), dim=-1)
        B = self.B.repeat(self.d_model // self.n_ssm, 1, 1)  # (H, N, 2)
        return diagonal_kernel(w, complex_product(B, self.C), self.log_dt, length, disc=self.disc, rate=rate)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, rate: float = 1.0) -> Tensor:
        """Convolve a batch of sequences with the layer's kernel.

        Args:
            x: (B, L, D). Padded tokens count as zeros.
            attention_mask: (B, L), True or 1 at real tokens.
            rate: factor of the step: 2 reads a sequence sampled twice as coarsely.

        Returns:
            y (B, L, channels * D), channels outermost, of x's dtype.
        """
        if x.dim() != 3 or x.size(-1) != self.d_model:
            raise ValueError(f"x has shape {list(x.shape)}, expected (B, L, {self.d_model})")
        u = x.to(self.D.dtype)
        if (mask := real_tokens(attention_mask, x)) is not None:
            u = u.masked_fill(~mask[..., None], 0)
        k = self.convolution_kernel(x.size(1), rate)
        forward, reverse = k.chunk(2) if self.bidirectional else (k, None)
        y = long_conv(u.transpose(1, 2), forward, self.D, reverse)  # (B, C, H, L)
        return y.permute(0, 3, 1, 2).flatten(-2).to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "S4":
        def keep_precision(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype not in (torch.float16, torch.bfloat16) else t.to(moved.device)

        return super()._apply(keep_precision, recurse)

    def extra_repr(self) -> str:
        return (
            f"d_model={self.d_model}, d_state={self.d_state}, init={self.init!r}, n_ssm={self.n_ssm}, "
            f"channels={self.channels}, bidirectional={self.bidirectional}, disc={self.disc!r}"
        )
