"""State matrices of state space models at initialisation, built in float64 on the CPU.

Sources: HiPPO (arXiv 2008.07669); S4D (arXiv 2206.11893), section 4. i and n count from 0.
"""

import math

import torch
from torch import Tensor

DIAGONAL_INITS = ("legs", "lin", "inv", "quad", "real")


def legs_normal_part(d_state: int) -> Tensor:
    """A + P P^T of HiPPO-LegS, (d_state, d_state): a constant diagonal plus a skew-symmetric matrix."""
    root = torch.sqrt(2 * torch.arange(d_state, dtype=torch.float64, device="cpu") + 1)
    outer = root[:, None] * root
    return 0.5 * (outer.triu(1) - outer.tril(-1)) - 0.5 * torch.eye(d_state, dtype=torch.float64, device="cpu")


def diagonal_state_matrix(init: str, d_state: int) -> Tensor:
    """The eigenvalues w (d_state / 2,), complex128, of which each stands for itself and its conjugate."""
    n = torch.arange(d_state // 2, dtype=torch.float64, device="cpu")
    real = torch.full_like(n, -0.5)
    match init:
        case "legs":
            skew = legs_normal_part(d_state) + 0.5 * torch.eye(d_state, dtype=torch.float64, device="cpu")
            # i times a skew-symmetric matrix is Hermitian; its eigenvalues come in pairs +-, ascending.
            imaginary = torch.linalg.eigvalsh(-1j * skew)[: d_state // 2]
        case "lin":
            imaginary = math.pi * n
        case "inv":
            imaginary = d_state / math.pi * (d_state / (1 + 2 * n) - 1)
        case "quad":
            imaginary = (1 + 2 * n) ** 2 / math.pi
        case "real":
            real, imaginary = -(1 + n), torch.zeros_like(n)
        case _:
            raise ValueError(f"init is {init!r}, expected one of {', '.join(DIAGONAL_INITS)}")
    return torch.complex(real, imaginary)
