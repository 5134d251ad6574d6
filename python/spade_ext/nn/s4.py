"""The S4 layer: a long convolution whose kernel a linear state space model generates."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..ops import diagonal_kernel, diagonal_scan, diagonal_step, long_conv, s4_kernel, s4_state, s4_step
from .dplr import complex_product, state_as_input, truncate, untruncate
from .hippo import DIAGONAL_INITS, DPLR_INITS, SMALLEST_RANK, diagonal_state_matrix, dplr
from .state_space import StateSpaceLayer, parameter_dtype


def join_channels(y: Tensor) -> Tensor:
    """(B, C, H, L) to (B, L, C H), channels outermost."""
    return y.permute(0, 3, 1, 2).flatten(-2)


class S4(StateSpaceLayer):
    """A state space model in each channel, x' = A x + B u, y = 2 Re(C x) + D u, run as a long convolution.

    Args:
        d_model: width, the number of channels H.
        d_state: size of a state; its N = d_state / 2 conjugate halves are stored. Even.
        kernel: "s4", A diagonal plus low-rank, discretised by the bilinear transform; "s4d", a diagonal A.
        init: A and B at initialisation: "legs", "legt", "fout" or "hippo" (half the copies legs, half fout) for s4;
            "legs", "lin", "inv", "quad" or "real" for s4d.
        rank: of A's low-rank part (s4); legt needs 2.
        n_ssm: copies S of (A, B), a divisor of d_model; channel h uses copy h mod S. None is d_model.
        channels: outputs a channel, C.
        bidirectional: a second kernel reads the sequence from its end.
        l_max: tokens at which s4 stores its C truncated; sequences may be longer. The buffer of that name goes with
            C into a state dict, and a loaded one counts.
        disc: discretisation of s4d, "zoh", "bilinear" or "dss".
        dt_min, dt_max: range of the step, log-uniform, in units of time a token.
        lr: learning rate of A and B: None is the optimizer's own, 0 freezes them (they become buffers).

    Parameters stay float32 in a half-precision module; float64 is taken.

    Source: S4 (arXiv 2111.00396); S4D (arXiv 2206.11893); HiPPO (arXiv 2008.07669).
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        *,
        kernel: Literal["s4", "s4d"] = "s4",
        init: str = "legs",
        rank: int = 1,
        n_ssm: int | None = None,
        channels: int = 1,
        bidirectional: bool = False,
        l_max: int = 1024,
        disc: Literal["zoh", "bilinear", "dss"] = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        lr: float | None = None,
    ):
        super().__init__()
        n_ssm = d_model if n_ssm is None else n_ssm
        self.d_model, self.d_state, self.n_ssm, self.channels = d_model, d_state, n_ssm, channels
        self.kernel, self.init, self.rank, self.disc = kernel, init, rank, disc
        self.bidirectional, self.dt_min, self.dt_max, self.lr = bidirectional, dt_min, dt_max, lr
        self.initial_l_max = self._nodes = l_max
        self._check_options()

        dtype = parameter_dtype()
        S, H, N, C = n_ssm, d_model, d_state // 2, channels * (2 if bidirectional else 1)
        state_matrix = {"log_w_real": (S, N), "w_imag": (S, N), "B": (S, N, 2)}
        if kernel == "s4":
            state_matrix["P"] = (rank, S, N, 2)
            self.register_buffer("l_max", torch.tensor(l_max))
        for name, shape in state_matrix.items():
            value = torch.empty(shape, dtype=dtype)
            if lr == 0:
                self.register_buffer(name, value)
            else:
                self.register_parameter(name, nn.Parameter(value))
        self.C = nn.Parameter(torch.empty(C, H, N, 2, dtype=dtype))  # forward channels, then reverse ones
        self.log_dt = nn.Parameter(torch.empty(H, dtype=dtype))
        self.D = nn.Parameter(torch.empty(channels, H, dtype=dtype))
        self.reset_parameters()

    def _check_options(self) -> None:
        def check(name: str, fits: bool, expected: str) -> None:
            if not fits:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected {expected}")

        check("d_model", self.d_model >= 1, "at least 1")
        check("kernel", self.kernel in ("s4", "s4d"), "'s4' or 's4d'")
        inits = DPLR_INITS if self.kernel == "s4" else DIAGONAL_INITS
        check("init", self.init in inits, f"one of {', '.join(inits)} for kernel {self.kernel!r}")
        if self.kernel == "s4":
            check("rank", self.rank >= SMALLEST_RANK[self.init], f"at least {SMALLEST_RANK[self.init]} for {self.init}")
        check("d_state", self.d_state >= 2 and self.d_state % 2 == 0, "an even number of at least 2")
        copies = self.n_ssm
        check("n_ssm", copies > 0 and self.d_model % copies == 0, f"a divisor of d_model = {self.d_model}")
        check("n_ssm", self.init != "hippo" or copies % 2 == 0, "an even number for init 'hippo'")
        check("channels", self.channels >= 1, "at least 1")
        check("disc", self.disc in ("zoh", "bilinear", "dss"), "'zoh', 'bilinear' or 'dss'")
        check("lr", self.lr is None or self.lr >= 0, "None, 0 or a positive number")
        if self.initial_l_max < 1:
            raise ValueError(f"l_max is {self.initial_l_max}, expected at least 1")
        if not 0 < self.dt_min <= self.dt_max:
            raise ValueError(f"dt_min and dt_max are {self.dt_min} and {self.dt_max}, expected 0 < dt_min <= dt_max")

    def initial_values(self) -> dict[str, Tensor]:
        """Fresh values of every parameter and buffer: A and B by `init`, C and D standard normal, dt log-uniform."""
        low, high = math.log(self.dt_min), math.log(self.dt_max)
        values = {
            "C": math.sqrt(0.5) * torch.randn(self.C.shape, dtype=torch.float64, device="cpu"),
            "log_dt": low + (high - low) * torch.rand(self.log_dt.shape, dtype=torch.float64, device="cpu"),
            "D": torch.randn(self.D.shape, device="cpu"),
        }
        if self.kernel == "s4d":
            w = diagonal_state_matrix(self.init, self.d_state).expand(self.n_ssm, -1)
            B, floor = torch.ones_like(w), 1e-4
        else:
            kinds = ("legs", "fout") if self.init == "hippo" else (self.init,)
            parts = [dplr(kind, self.d_state, self.rank) for kind in kinds]
            copies = [part for part in parts for _ in range(self.n_ssm // len(parts))]
            w, P, B = (torch.stack(tensors, dim=-2) for tensors in zip(*copies, strict=True))
            floor = 1e-3
            values |= {"P": torch.view_as_real(P), "l_max": torch.tensor(self.initial_l_max, device="cpu")}
        decay = (-w.real).clamp(min=floor)
        values |= {"log_w_real": decay.log(), "w_imag": w.imag, "B": torch.view_as_real(B)}
        if self.kernel == "s4":
            w = torch.stack((-decay, w.imag), dim=-1)
            values["C"] = truncate(values["C"], w, values["P"], values["log_dt"], self.initial_l_max)
        return values

    def reset_parameters(self, copy_: Callable[[Tensor, Tensor], Any] = Tensor.copy_) -> None:
        super().reset_parameters(copy_)
        self._read_l_max()

    def parameter_options(self) -> dict[str, dict[str, Any]]:
        """Optimizer options by parameter: no weight decay on the dynamics, and A and B at `lr`."""
        state_matrix = {"weight_decay": 0.0} | ({"lr": self.lr} if self.lr else {})
        options = dict.fromkeys(("log_w_real", "w_imag", "P", "B"), state_matrix) | {"log_dt": {"weight_decay": 0.0}}
        own = dict(self.named_parameters(recurse=False))
        return {name: option for name, option in options.items() if name in own}

    @property
    def w(self) -> Tensor:
        """The diagonal of A, (S, N, 2)."""
        return torch.stack((-self.log_w_real.exp(), self.w_imag), dim=-1)

    @property
    def state_size(self) -> tuple[int, int, int]:
        return (self.d_model, self.d_state // 2, 2)

    def _every_channel(self, t: Tensor) -> Tensor:
        """(..., S, N, 2) repeated to (..., H, N, 2)."""
        return t.repeat(*(1,) * (t.dim() - 3), self.d_model // self.n_ssm, 1, 1)

    def _log_dt(self, rate: float) -> Tensor:
        return self.log_dt if rate == 1 else self.log_dt + math.log(rate)

    def convolution_kernel(self, length: int, rate: float = 1.0) -> Tensor:
        """The kernels (C, H, length) of all channels, forward ones before reverse ones."""

        def kernel() -> Tensor:
            if self.kernel == "s4":
                k = s4_kernel(self.w, self.P, self.B[None], self.C, self.log_dt, length, nodes=self.nodes, rate=rate)
                return k.squeeze(0)
            c = complex_product(self._every_channel(self.B), self.C)
            return diagonal_kernel(self.w, c, self.log_dt, length, disc=self.disc, rate=rate)

        return self.reuse(("kernel", length, rate), kernel)

    def convolve(self, u: Tensor, kernel: Tensor, segment_ids: Tensor | None) -> Tensor:
        forward, reverse = kernel.chunk(2) if self.bidirectional else (kernel, None)
        return join_channels(long_conv(u.mT, forward, self.D, reverse, segment_ids))

    @property
    def can_scan(self) -> bool:
        # A scan's reverse direction sees the token itself, this layer's does not.
        return self.kernel == "s4d" and self.disc != "dss" and not self.bidirectional

    def advance(
        self, u: Tensor, state: Tensor | None, segment_ids: Tensor | None = None, rate: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        log_dt = self._log_dt(rate)
        if self.kernel == "s4d":
            y, state = diagonal_scan(
                u.mT, self.w, self.B, self.C, log_dt, state, self.D, disc=self.disc, segment_ids=segment_ids
            )
            return join_channels(y), state
        if state is None:
            y = long_conv(u.mT, self.convolution_kernel(u.size(1), rate), self.D)
        else:
            w, P = self._every_channel(self.w), self._every_channel(self.P)
            b = torch.cat([self._every_channel(self.B)[None], state_as_input(state, w, P, log_dt)])
            k = s4_kernel(w, P, b, self.C, self.log_dt, u.size(1), nodes=self.nodes, rate=rate)
            y = long_conv(u.mT, k[0], self.D) + k[1:]
        with torch.no_grad():
            state = s4_state(u.mT, self.w, self.P, self.B, log_dt, state)
        return join_channels(y), state

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        state: Tensor | None = None,
        rate: float = 1.0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run over a batch of sequences.

        Args:
            x: (B, L, D). Padded tokens count as zeros.
            attention_mask: (B, L), True or 1 at real tokens.
            segment_ids: (B, L), integers: a run of equal ids is a document of its own, which starts from a zero
                state; a row's first one from `state`.
            state: (B, D, N, 2), the state before the first token; not changed. See `initial_state`.
            rate: factor of the step: 2 reads a sequence sampled twice as coarsely. Of kernel "s4" another rate than
                1 is the published approximation, which depends on l_max and on the length.

        Returns:
            y (B, L, channels * D), channels outermost, of x's dtype; where a state is given, also the state after
            each row's last real token. Of kernel "s4" that state has no gradient; the given one has.

        Raises:
            ValueError, TypeError: a shape or dtype that does not fit; a state for a two-sided layer or disc "dss".
        """
        if not 0 < rate < math.inf:
            raise ValueError(f"rate is {rate}, expected a positive number")
        return self.run(x, attention_mask, segment_ids, state, rate=rate)

    def advance_token(self, u: Tensor, state: Tensor) -> Tensor:
        # Kernel "s4" solves for its C at each token, unless `reuse_kernels` keeps it.
        if self.kernel == "s4":
            y = s4_step(u, self.w, self.P, self.B, self._untruncated(), self.log_dt, state)
        else:
            y = diagonal_step(u, self.w, self.B, self.C, self.log_dt, state, disc=self.disc)
        return (y + self.D * u[:, None]).flatten(1)

    def prepare_steps(self) -> None:
        if self.kernel == "s4":
            self._untruncated()

    def _untruncated(self) -> Tensor:
        return self.reuse("C", lambda: untruncate(self.C, self.w, self.P, self.log_dt, self.nodes))

    @property
    def kernel_grows(self) -> bool:
        return self.kernel == "s4" or self.disc != "dss"

    def check_has_states(self) -> None:
        super().check_has_states()
        if not self.kernel_grows:
            raise ValueError("disc is 'dss', expected 'zoh' or 'bilinear' for a state: dss depends on the whole length")

    # The truncation of C is a buffer, but compiled code wants a number, which follows whichever way that is loaded.
    @property
    def nodes(self) -> int:
        """The truncation of C, in tokens."""
        return self._nodes if torch.compiler.is_compiling() or self.l_max.is_meta else int(self.l_max)

    def _read_l_max(self) -> None:
        if self.kernel == "s4" and not self.l_max.is_meta:
            self._nodes = int(self.l_max)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "l_max":
            self._read_l_max()

    def _load_from_state_dict(self, *args) -> None:
        super()._load_from_state_dict(*args)
        self._read_l_max()

    def extra_repr(self) -> str:
        kind = f"rank={self.rank}, l_max={self.nodes}" if self.kernel == "s4" else f"disc={self.disc!r}"
        return (
            f"d_model={self.d_model}, d_state={self.d_state}, kernel={self.kernel!r}, init={self.init!r}, "
            f"n_ssm={self.n_ssm}, channels={self.channels}, bidirectional={self.bidirectional}, {kind}"
        )
