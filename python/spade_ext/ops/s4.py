"""S4: state space models whose state matrix is diagonal plus low-rank, discretised by the bilinear transform."""

import torch
from torch import Tensor


def s4_kernel(
    w: Tensor, p: Tensor, b: Tensor, c: Tensor, log_dt: Tensor, length: int, *, nodes: int, rate: float = 1.0
) -> Tensor:
    r"""The convolution kernels of S4.

    ``k[m,c,h,l] = 2 Re(C[c,h] Abar[h]^l Bbar[m,h])`` for l in [0, length), where C Abar^l comes from the truncated
    ``c = C (I - Abar^nodes)``, ``Abar = (I - dt/2 A)^-1 (I + dt/2 A)``, ``Bbar = dt (I - dt/2 A)^-1 b`` and
    ``A = diag(w) - sum_r p_r p_r^*`` over all states, of which one of each conjugate pair is stored. Computed as a
    Cauchy sum with Woodbury's formula at roots of unity, and at nodes inside the unit circle for a length beyond nodes.

    Args:
        w: (S, N, 2), complex numbers as real pairs, of non-positive real part; channel h uses copy h mod S.
        p: (R, S, N, 2), the low-rank part, of any rank R.
        b: (M, S, N, 2), inputs; or initial states x_0 as ``(x_0 + dt/2 A x_0) / dt``, whose kernel is what they add
            to the output.
        c: (C, H, N, 2), truncated outputs; S divides H.
        log_dt: (H,), natural logarithm of the step.
        length: number of taps.
        nodes: the truncation that c has been given, in tokens.
        rate: the step's factor, a change of sampling rate, from 1e-6 to 1e6, with nodes / rate at most 2^31. c belongs
            to rate 1. Another rate is the published approximation, with round(nodes / rate), at least 1, for nodes: it
            depends on nodes.

    Returns:
        (M, C, H, length), contiguous. float32 or float64 as w; the arithmetic is float64 either way.

    Raises:
        ValueError, TypeError: a shape, dtype, device or number that does not fit, named in one sentence.

    Source: Gu et al., S4 (arXiv 2111.00396), section 3 and appendix C.
    """
    return torch.ops.spade_ext.s4_kernel(w, p, b, c, log_dt, length, nodes, rate)


def s4_kernel_ref(
    w: Tensor, p: Tensor, b: Tensor, c: Tensor, log_dt: Tensor, length: int, *, nodes: int, rate: float = 1.0
) -> Tensor:
    """`s4_kernel` by powers of dense matrices: k[l] = c Abar^l (I - Abar^n)^-1 Bbar, n roots of unity."""
    row, nodes = output_rows(c), max(round(nodes / rate), 1)
    step, input_step = bilinear(state_matrix(w, p, log_dt), log_dt, rate)
    truncation = torch.eye(step.size(-1), dtype=torch.float64) - torch.linalg.matrix_power(step, nodes)
    columns = b.double().repeat(1, log_dt.size(0) // w.size(0), 1, 1).mT.flatten(2)  # (M, H, 2N)
    state = torch.linalg.solve(truncation, input_step @ columns[..., None]).squeeze(-1)
    rows = row.unsqueeze(0)  # c Abar^l, (L, C, H, 2N)
    while len(rows) < length:
        rows = torch.cat([rows, torch.einsum("lchi,hij->lchj", rows, torch.linalg.matrix_power(step, len(rows)))])
    k = 2 * torch.einsum("lchn,mhn->mchl", rows[:length], state)
    return k.to(w.dtype)


def s4_state(u: Tensor, w: Tensor, p: Tensor, b: Tensor, log_dt: Tensor, state: Tensor | None = None) -> Tensor:
    r"""The state of S4 after a sequence, ``Abar^L x_0 + sum_l Abar^(L-1-l) Bbar u_l``. It has no gradient.

    Args:
        u: (B, H, L), any strides.
        w, p, log_dt: see `s4_kernel`.
        b: (S, N, 2).
        state: (B, H, N, 2), x_0; zeros unless given. It is not changed.

    Returns:
        (B, H, N, 2), contiguous, float32 or float64 as w; the arithmetic is float64 either way.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit, named in one sentence.

    Source: Gu et al., S4 (arXiv 2111.00396), section 3.
    """
    return torch.ops.spade_ext.s4_state(u, w, p, b, log_dt, state)


def s4_state_ref(u: Tensor, w: Tensor, p: Tensor, b: Tensor, log_dt: Tensor, state: Tensor | None = None) -> Tensor:
    """`s4_state` by products with dense matrices."""
    (B, H, L), N = u.shape, w.size(1)
    step, input_step = bilinear(state_matrix(w, p, log_dt), log_dt)
    column = input_step @ b.double().repeat(H // w.size(0), 1, 1).mT.flatten(1)[..., None]  # (H, 2N, 1)
    x = torch.zeros(B, H, 2 * N, dtype=torch.float64) if state is None else state.double().mT.flatten(2)
    for position in range(L):
        x = torch.einsum("hij,bhj->bhi", step, x) + column[..., 0] * u[..., position, None].double()
    return x.unflatten(-1, (2, N)).mT.contiguous().to(w.dtype)


def s4_step(u: Tensor, w: Tensor, p: Tensor, b: Tensor, c: Tensor, log_dt: Tensor, state: Tensor) -> Tensor:
    r"""One token of S4: ``state <- Abar state + Bbar u``, in place, and ``y = 2 Re(c state)``. It has no gradient.

    Args:
        u: (B, H).
        w, p, log_dt: see `s4_kernel`.
        b: (S, N, 2).
        c: (C, H, N, 2), not truncated.
        state: (B, H, N, 2), changed. In a function that is compiled with dynamic shapes pass a whole tensor: of a view
            that is taken there, torch writes the wrong part.

    Returns:
        (B, C, H), contiguous.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit, named in one sentence.
        NotImplementedError: an argument requires a gradient while gradients are recorded.

    Source: Gu et al., S4 (arXiv 2111.00396), section 3.
    """
    return torch.ops.spade_ext.s4_step(u, w, p, b, c, log_dt, state)


def s4_step_ref(u: Tensor, w: Tensor, p: Tensor, b: Tensor, c: Tensor, log_dt: Tensor, state: Tensor) -> Tensor:
    """`s4_step` by `s4_state_ref`."""
    x = s4_state_ref(u[..., None], w, p, b, log_dt, state)
    y = 2 * torch.einsum("chn,bhn->bch", output_rows(c), x.double().mT.flatten(2))
    state.copy_(x)
    return y.to(u.dtype)


def state_matrix(w: Tensor, p: Tensor, log_dt: Tensor) -> Tensor:
    """A over the real and imaginary parts of the stored states, (H, 2N, 2N) float64, for each channel of log_dt (H,).

    Over these parts, p^* x of all states is 2 (Re p . Re x + Im p . Im x).
    """
    real, imaginary = (part.double().diag_embed() for part in w.unbind(-1))
    diagonal = torch.cat([torch.cat([real, -imaginary], -1), torch.cat([imaginary, real], -1)], -2)  # (S, 2N, 2N)
    columns = p.double().mT.flatten(2)  # (R, S, 2N)
    matrix = diagonal - 2 * torch.einsum("rsi,rsj->sij", columns, columns)
    return matrix.repeat(log_dt.size(0) // w.size(0), 1, 1)


def bilinear(matrix: Tensor, log_dt: Tensor, rate: float = 1.0) -> tuple[Tensor, Tensor]:
    """Abar and dt (I - dt/2 A)^-1, both (H, 2N, 2N), of A (H, 2N, 2N) with dt = exp(log_dt) rate."""
    dt = (log_dt.double().exp() * rate)[:, None, None]
    one = torch.eye(matrix.size(-1), dtype=torch.float64, device=matrix.device)
    inverse = torch.linalg.inv(one - dt / 2 * matrix)
    return inverse @ (one + dt / 2 * matrix), dt * inverse


def output_rows(c: Tensor) -> Tensor:
    """Rows (C, H, 2N) float64 whose product with the parts of a state is Re(c x), for c (C, H, N, 2)."""
    return (c.double() * torch.tensor([1, -1], device=c.device)).mT.flatten(2)


def times_power(rows: Tensor, step: Tensor, exponent: int) -> Tensor:
    """rows (C, H, 2N) times step^exponent, step (H, 2N, 2N)."""
    return torch.einsum("chi,hij->chj", rows, torch.linalg.matrix_power(step, exponent))
