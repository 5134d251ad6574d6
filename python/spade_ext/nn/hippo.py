"""State matrices of state space models at initialisation, built in float64 on the CPU.

Sources: HiPPO (arXiv 2008.07669); S4 (arXiv 2111.00396), appendix C; S4D (arXiv 2206.11893), section 4. i, j and n
count from 0.
"""

import math

import torch
from torch import Tensor

DPLR_INITS = ("legs", "legt", "fout", "hippo")
DIAGONAL_INITS = ("legs", "lin", "inv", "quad", "real")
SMALLEST_RANK = {"legs": 1, "legt": 2, "fout": 1, "hippo": 1}


def hippo_matrix(init: str, d_state: int) -> tuple[Tensor, Tensor, Tensor]:
    """A (d_state, d_state), B (d_state,) and P (rank, d_state), for which A + P^T P is normal."""
    n = torch.arange(d_state, dtype=torch.float64, device="cpu")
    root = torch.sqrt(2 * n + 1)
    match init:
        case "legs":
            A = -torch.outer(root, root).tril(-1) - torch.diag(n + 1)
            return A, root, torch.sqrt(n + 0.5)[None]
        case "legt":
            sign = torch.where(n[:, None] < n, (-1.0) ** (n[:, None] - n), 1.0)
            odd = n % 2
            return -0.5 * torch.outer(root, root) * sign, 0.5 * root, root / math.sqrt(2) * torch.stack((odd, 1 - odd))
        case "fout":
            B = math.sqrt(2) * (1 - n % 2)
            B[0] = 1
            rotation = torch.diag((math.pi * (n // 2) * (1 - n % 2))[:-1], 1)  # [2m, 2m + 1] = pi m
            return rotation.T - rotation - torch.outer(B, B), B, B[None]
    raise ValueError(f"init is {init!r}, expected one of legs, legt, fout")


def dplr(init: str, d_state: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """w (N,), P (rank, N) and B (N,), complex128, N = d_state / 2: A = diag(w) - sum_r P_r P_r^* and B in the basis
    of A's normal part, one of each conjugate pair, that of negative (or zero) imaginary part.

    Args:
        init: "legs", "legt" or "fout".
        rank: legt has 2 rows of P, the others 1; the rest is zero.
    """
    A, B, P = hippo_matrix(init, d_state)
    if rank < len(P):
        raise ValueError(f"rank is {rank}, expected at least {len(P)} for init {init!r}")
    normal = A + P.T @ P  # a constant diagonal plus a skew-symmetric matrix
    skew = normal - normal.diagonal().diag()
    # i times a skew-symmetric matrix is Hermitian; its eigenvalues come in pairs +-, ascending.
    imaginary, vectors = torch.linalg.eigh(-1j * skew)
    imaginary, vectors = imaginary[: d_state // 2], vectors[:, : d_state // 2]
    if init == "fout":  # eigenvalue 0 twice: of its vectors, those of a conjugate pair
        vectors[:, -1] = 0
        vectors[0, -1], vectors[1, -1] = math.sqrt(0.5), 1j * math.sqrt(0.5)
        imaginary[-1] = 0
    w = torch.complex(normal.diagonal().mean().expand_as(imaginary), imaginary)
    P = torch.cat([P, P.new_zeros(rank - len(P), d_state)])
    return w, P.to(w.dtype) @ vectors.conj(), B.to(w.dtype) @ vectors.conj()


def diagonal_state_matrix(init: str, d_state: int) -> Tensor:
    """The eigenvalues w (d_state / 2,), complex128, of which each stands for itself and its conjugate."""
    n = torch.arange(d_state // 2, dtype=torch.float64, device="cpu")
    real = torch.full_like(n, -0.5)
    match init:
        case "legs":
            return dplr("legs", d_state, 1)[0]
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
