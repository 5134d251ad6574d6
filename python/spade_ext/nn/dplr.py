"""Algebra on S4's parameters beside its kernel: complex pairs, initial states, the truncation of C."""

import torch
from torch import Tensor

from ..ops.s4 import bilinear, output_rows, state_matrix, times_power


def complex_product(a: Tensor, b: Tensor) -> Tensor:
    """The product of complex numbers stored as real pairs (..., 2).

    In real arithmetic: torch's complex one stops the process on pairs that a file maps at an odd address.
    """
    (a_real, a_imaginary), (b_real, b_imaginary) = a.unbind(-1), b.unbind(-1)
    real = a_real * b_real - a_imaginary * b_imaginary
    return torch.stack((real, a_real * b_imaginary + a_imaginary * b_real), dim=-1)


def state_as_input(state: Tensor, w: Tensor, p: Tensor, log_dt: Tensor) -> Tensor:
    """The input weights b (B, H, N, 2), b = (x_0 + dt/2 A x_0) / dt, whose kernel is what x_0 adds to the output.

    state x_0 (B, H, N, 2), w (H, N, 2), p (R, H, N, 2), log_dt (H,), all of one dtype.
    """
    dt = log_dt.exp()[:, None, None]
    derivative = complex_product(w.expand_as(state), state)
    for row in p:  # products and sums as they stand: autocast would run those of einsum in half precision
        derivative = derivative - 2 * row * (row * state).sum((-2, -1), keepdim=True)
    return state / dt + derivative / 2


def truncate(c: Tensor, w: Tensor, p: Tensor, log_dt: Tensor, length: int) -> Tensor:
    """C (I - Abar^length), (C, H, N, 2) like c, computed in float64.

    w (S, N, 2), p (R, S, N, 2), log_dt (H,). Source: S4 (arXiv 2111.00396), lemma C.3.
    """
    step, rows = bilinear(state_matrix(w, p, log_dt), log_dt)[0], output_rows(c)
    return _pairs(rows - times_power(rows, step, length)).to(c.dtype)


def untruncate(c: Tensor, w: Tensor, p: Tensor, log_dt: Tensor, length: int) -> Tensor:
    """C of c = C (I - Abar^length): the inverse of `truncate`."""
    step, rows = bilinear(state_matrix(w, p, log_dt), log_dt)[0], output_rows(c)
    one = torch.eye(step.size(-1), dtype=step.dtype, device=step.device)
    truncation = one - torch.linalg.matrix_power(step, length)
    return _pairs(torch.linalg.solve(truncation, rows.unsqueeze(-2), left=False).squeeze(-2)).to(c.dtype)


def _pairs(rows: Tensor) -> Tensor:
    """Rows (C, H, 2N) as complex weights (C, H, N, 2)."""
    real, imaginary = rows.chunk(2, -1)
    return torch.stack((real, -imaginary), -1)
