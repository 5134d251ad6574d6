"""Diagonal state space models: S4D with complex states, the exponential moving average with real ones."""

from typing import Literal

import torch
from torch import Tensor

Disc = Literal["zoh", "bilinear", "dss"]


def diagonal_kernel(
    w: Tensor, c: Tensor, log_dt: Tensor | None, length: int, *, disc: Disc | None = "zoh", rate: float = 1.0
) -> Tensor:
    r"""The convolution kernel of a diagonal state space model.

    ``k[c,h,l] = 2 Re sum_n cbar[c,h,n] abar[h,n]^l`` for l in [0, length), with abar and cbar from
    ``dt = exp(log_dt) * rate`` by the discretisation `disc`:

    * ``"zoh"``: abar = exp(w dt), cbar = c (exp(w dt) - 1) / w
    * ``"bilinear"``: abar = (1 + w dt / 2) / (1 - w dt / 2), cbar = c dt / (1 - w dt / 2)
    * ``"dss"``: abar as zoh, cbar = c (exp(w dt) - 1) / (w (exp(w dt length) - 1)), a sum without the factor 2
    * None: abar = exp(w), cbar = c; log_dt must be None (the moving average: w = log q)

    Args:
        w: (S, N, 2), complex numbers as real pairs, or (S, N), reals; channel h uses row h mod S. With reals the
            kernel is the sum itself, not twice its real part.
        c: (C, H, N, 2) or (C, H, N): input times output weights of each state. S divides H.
        log_dt: (H,), natural logarithm of the step.
        length: number of taps.
        rate: the step's factor, a change of sampling rate.

    Returns:
        (C, H, length), contiguous. float32 or float64 as w; the arithmetic is float64 either way.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit, named in one sentence.

    Source: Gu et al., S4D (arXiv 2206.11893), section 3; Gupta et al., DSS (arXiv 2203.14343); Ma et al., MEGA
    (arXiv 2209.10655), section 3.1.
    """
    return torch.ops.spade_ext.diagonal_kernel(w, c, log_dt, length, disc, rate)


def diagonal_kernel_ref(
    w: Tensor, c: Tensor, log_dt: Tensor | None, length: int, *, disc: Disc | None = "zoh", rate: float = 1.0
) -> Tensor:
    """`diagonal_kernel` as a product with a Vandermonde matrix, (C, H, N, length) in memory, float64 inside."""
    pairs = w.dim() == 3
    H, S = c.size(1), w.size(0)
    a = (torch.complex(*w.double().unbind(-1)) if pairs else w.double()).repeat(H // S, 1)  # (H, N)
    coefficient = torch.complex(*c.double().unbind(-1)) if pairs else c.double()  # (C, H, N)
    if disc is None:
        log_abar = a
    else:
        assert log_dt is not None
        dt = (log_dt.double().exp() * rate)[:, None]
        x = a * dt
        log_abar = x if disc in ("zoh", "dss") else torch.log((1 + x / 2) / (1 - x / 2))
        if disc == "bilinear":
            coefficient = coefficient * dt / (1 - x / 2)
        elif disc == "zoh":
            coefficient = coefficient * torch.special.expm1(x) / a if not pairs else coefficient * (x.exp() - 1) / a
        else:
            coefficient = coefficient * (x.exp() - 1) / (a * ((x * length).exp() - 1))
    powers = (log_abar[..., None] * torch.arange(length, device=w.device)).exp()  # (H, N, length)
    k = torch.einsum("chn,hnl->chl", coefficient, powers.to(coefficient.dtype))
    return ((1 if disc == "dss" else 2) * k.real if pairs else k).to(w.dtype)
