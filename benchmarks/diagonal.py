"""diagonal_kernel (S4D, zoh) against a materialised Vandermonde matrix in complex64."""

import math
import os

import torch
from timing import Benchmark
from torch import Tensor

from spade_ext.ops import diagonal_kernel


def vandermonde(w: Tensor, c: Tensor, log_dt: Tensor, length: int) -> Tensor:
    """The published S4D kernel, (H, N, length) in memory."""
    a, coefficient = torch.view_as_complex(w), torch.view_as_complex(c)
    x = a * log_dt.exp()[:, None]
    powers = (x[..., None] * torch.arange(length)).exp()
    return 2 * torch.einsum("chn,hnl->chl", coefficient * (x.exp() - 1) / a, powers).real


def rows_that_fit(H: int, N: int, L: int) -> int:
    """At most H: eight complex64 copies of the Vandermonde matrix take no more than half of the memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(H, memory // 2 // (8 * 8 * N * L))


def main() -> None:
    benchmark = Benchmark(__doc__)
    H, N, L = (16, 8, 128) if benchmark.quick else (512, 32, 4096)
    H = rows_that_fit(H, N, L)
    w = torch.stack((torch.full((H, N), -0.5), -math.pi * torch.arange(N).expand(H, N)), dim=-1)  # S4D-Lin
    c = torch.randn(1, H, N, 2)
    log_dt = torch.empty(H).uniform_(math.log(1e-3), math.log(1e-1))

    def ours(w: Tensor, c: Tensor, log_dt: Tensor) -> Tensor:
        return diagonal_kernel(w, c, log_dt, L)

    def peer(w: Tensor, c: Tensor, log_dt: Tensor) -> Tensor:
        return vandermonde(w, c, log_dt, L)

    case = f"C 1 H {H} N {N} L {L}"
    flops = (4 * H * N * L, 8 * H * N * L)
    benchmark.compare(case, ours, "Vandermonde", peer, [w, c, log_dt], flops, tolerance=1e-4)
    benchmark.compare_threads(case, ours, [w, c, log_dt])


if __name__ == "__main__":
    main()
