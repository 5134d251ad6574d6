"""Diagonal state space models: S4D with complex states, the exponential moving average with real ones."""

from typing import Literal

import torch
from torch import Tensor

from .long_conv import document_numbers

Disc = Literal["zoh", "bilinear", "dss"]
RecurrentDisc = Literal["zoh", "bilinear"]


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
        (C, H, length), contiguous. float32 or float64 as w; powers are formed in float64 either way.

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
    abar, scale = discretize(w, log_dt, c.size(1), disc, rate, length)
    powers = abar[..., None] ** torch.arange(length, device=w.device)  # (H, N, length)
    k = torch.einsum("chn,hnl->chl", in_float64(c, w) * scale, powers)
    return (2 * k.real if w.dim() == 3 and disc != "dss" else k.real).to(w.dtype)


def diagonal_scan(
    u: Tensor,
    w: Tensor,
    b: Tensor,
    c: Tensor,
    log_dt: Tensor | None,
    state: Tensor | None = None,
    skip: Tensor | None = None,
    *,
    disc: RecurrentDisc | None = "zoh",
    bidirectional: bool = False,
    segment_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""A diagonal state space model as a recurrence, with an initial and a final state.

    ``x_t = abar x_{t-1} + bbar u_t``, ``y_t = 2 Re sum_n c x_t + skip u_t``, with abar and bbar from
    ``dt = exp(log_dt)`` by the discretisation `disc`:

    * ``"zoh"``: abar = exp(w dt), bbar = b (exp(w dt) - 1) / w
    * ``"bilinear"``: abar = (1 + w dt / 2) / (1 - w dt / 2), bbar = b dt / (1 - w dt / 2)
    * None: abar = exp(w), bbar = b; log_dt must be None (the moving average: w = log q)

    From a state of zeros, y is the convolution of u with ``diagonal_kernel(w, b c, log_dt, L)``. A sequence cut
    anywhere and run in pieces, the state handed on, gives what the whole gives, gradients included.

    With `bidirectional` there are two systems a channel: c, log_dt and state have 2 H channels, of which the last H run
    from the last token to the first. y is the sum of both directions; both see the token itself.

    Args:
        u: (B, H, L), any strides.
        w: (S, N, 2), complex numbers as real pairs, or (S, N), reals; channel h uses row h mod S. With reals y is the
            sum itself, not twice its real part.
        b: as w, input weight of each state.
        c: (C, H, N, 2) or (C, H, N), output weights of each state. S divides H.
        log_dt: (H,), natural logarithm of the step.
        state: (B, H, N, 2) or (B, H, N), before the first token; zeros unless given.
        skip: (C, H), weights of u itself; zeros unless given.
        segment_ids: (B, L), integers, of packed rows: a run of equal ids is a document. Each starts from zeros but the
            one that time runs into first, and the returned state is that after the one that it runs into last.

    Returns:
        y (B, C, H, L) in u's layout: where u is a transposed contiguous (B, L, H), y is a transposed contiguous
        (B, L, C, H); and the state after the last token, contiguous, a copy of `state` where L is 0. float32 or float64
        as the arguments.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit, named in one sentence.

    Source: Gu et al., S4D (arXiv 2206.11893), section 3; Ma et al., MEGA (arXiv 2209.10655), section 3.1.
    """
    return torch.ops.spade_ext.diagonal_scan(u, w, b, c, log_dt, state, skip, disc, bidirectional, segment_ids)


def diagonal_scan_ref(
    u: Tensor,
    w: Tensor,
    b: Tensor,
    c: Tensor,
    log_dt: Tensor | None,
    state: Tensor | None = None,
    skip: Tensor | None = None,
    *,
    disc: RecurrentDisc | None = "zoh",
    bidirectional: bool = False,
    segment_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`diagonal_scan` as a loop over tokens, all states in memory, float64 inside."""
    B, H, pairs = u.size(0), c.size(1), w.dim() == 3
    abar, scale = discretize(w, log_dt, H, disc)
    bbar = in_float64(b, w).repeat(H // w.size(0), 1) * scale
    x = abar.new_zeros(B, *abar.shape) if state is None else in_float64(state, w)  # (B, H, N)
    states = [x]
    u = u.double()
    document = document_numbers(u.new_zeros(B, u.size(-1)) if segment_ids is None else segment_ids)
    inputs, document = u, document[:, None].expand_as(u)
    if bidirectional:
        inputs, document = (torch.cat([t, t.flip(-1)], 1) for t in (inputs, document))
    for t, u_t in enumerate(inputs.unbind(-1)):
        if t > 0:
            x = torch.where((document[..., t] == document[..., t - 1])[..., None], x, 0)
        x = abar * x + bbar * u_t[..., None]
        states.append(x)
    y = torch.einsum("chn,tbhn->bcht", in_float64(c, w), torch.stack(states)[1:])
    y = 2 * y.real if pairs else y
    if bidirectional:
        forward, reverse = y.chunk(2, 2)
        y = forward + reverse.flip(-1)
    if skip is not None:
        y = y + skip.double()[..., None] * u[:, None]
    return y.to(w.dtype), (torch.view_as_real(x) if pairs else x).to(w.dtype, copy=True)


def diagonal_step(
    u: Tensor,
    w: Tensor,
    b: Tensor,
    c: Tensor,
    log_dt: Tensor | None,
    state: Tensor,
    *,
    disc: RecurrentDisc | None = "zoh",
) -> Tensor:
    """One token of `diagonal_scan`, without gradients: inside of torch.no_grad() or without trainable arguments.

    Args:
        u: (B, H).
        state: (B, H, N, 2) or (B, H, N), overwritten by the state after the token. In a function that is compiled
            with dynamic shapes pass a whole tensor: of a view that is taken there, torch writes the wrong part.

    Returns:
        y (B, C, H), contiguous.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit, named in one sentence.
        NotImplementedError: an argument requires a gradient while gradients are recorded.
    """
    return torch.ops.spade_ext.diagonal_step(u, w, b, c, log_dt, state, disc)


def diagonal_step_ref(
    u: Tensor,
    w: Tensor,
    b: Tensor,
    c: Tensor,
    log_dt: Tensor | None,
    state: Tensor,
    *,
    disc: RecurrentDisc | None = "zoh",
) -> Tensor:
    """`diagonal_step` as a scan over one token."""
    y, next_state = diagonal_scan_ref(u[..., None], w, b, c, log_dt, state, disc=disc)
    state.copy_(next_state)
    return y.squeeze(-1)


def in_float64(t: Tensor, w: Tensor) -> Tensor:
    """t as complex128 where w, and so t, holds real pairs, as float64 where it holds reals."""
    return torch.view_as_complex(t.double().contiguous()) if w.dim() == 3 else t.double()


def discretize(
    w: Tensor, log_dt: Tensor | None, H: int, disc: Disc | None, rate: float = 1.0, length: int = 0
) -> tuple[Tensor, Tensor]:
    """For the references: abar and the factor scale in bbar = scale b, (H, N), float64 or complex128."""
    a = in_float64(w, w).repeat(H // w.size(0), 1)
    if log_dt is None:
        return a.exp(), torch.ones_like(a)
    dt = (log_dt.double().exp() * rate)[:, None]
    x = a * dt
    match disc:
        case "zoh":
            return x.exp(), torch.expm1(x) / a
        case "bilinear":
            return (1 + x / 2) / (1 - x / 2), dt / (1 - x / 2)
        case "dss":
            return x.exp(), torch.expm1(x) / (a * torch.expm1(x * max(length, 1)))  # 0 taps have no gradient, not NaN
    raise ValueError(f"disc is {disc!r}, expected 'zoh', 'bilinear', 'dss' or None")
