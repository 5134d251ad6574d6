"""diagonal_kernel (S4D, zoh) against a materialised Vandermonde matrix in complex64 and against diagonal_kernel_ref;
diagonal_scan against diagonal_scan_ref."""

import math
import os

import torch
from timing import Benchmark
from torch import Tensor

from spade_ext.ops import diagonal_kernel, diagonal_kernel_ref, diagonal_scan, diagonal_scan_ref


def vandermonde(w: Tensor, c: Tensor, log_dt: Tensor, length: int) -> Tensor:
    """The published S4D kernel, (H, N, length) in memory."""
    a, coefficient = torch.view_as_complex(w), torch.view_as_complex(c)
    x = a * log_dt.exp()[:, None]
    powers = (x[..., None] * torch.arange(length)).exp()
    return 2 * torch.einsum("chn,hnl->chl", coefficient * (x.exp() - 1) / a, powers).real


def rows_that_fit(H: int, N: int, L: int) -> int:
    """At most H: eight complex128 copies of the Vandermonde matrix take no more than half of the memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(H, memory // 2 // (8 * 16 * N * L))


def kernels(benchmark: Benchmark, H: int, N: int, L: int) -> None:
    w = torch.stack((torch.full((H, N), -0.5), -math.pi * torch.arange(N).expand(H, N)), dim=-1)  # S4D-Lin
    inputs = [w, torch.randn(1, H, N, 2), torch.empty(H).uniform_(math.log(1e-3), math.log(1e-1))]
    case = f"kernel, C 1 H {H} N {N} L {L}"
    flops = (4 * H * N * L, 8 * H * N * L)

    def ours(*inputs: Tensor) -> Tensor:
        return diagonal_kernel(*inputs, L)

    for name, peer in {"Vandermonde": vandermonde, "diagonal_kernel_ref": diagonal_kernel_ref}.items():
        benchmark.compare(case, ours, name, lambda *t, peer=peer: peer(*t, L), inputs, flops, tolerance=1e-4)
    benchmark.compare_threads(case, ours, inputs)


def scans(benchmark: Benchmark, B: int, H: int, N: int, L: int) -> None:
    w = -torch.rand(H, N)
    inputs = [torch.randn(B, L, H).mT, w, torch.randn_like(w), torch.randn(1, H, N)]
    case = f"scan, B {B} H {H} N {N} reals L {L}"
    flops = ((4 * N + 18) * B * H * L, (12 * N + 38) * B * H * L)

    def ours(u: Tensor, w: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return diagonal_scan(u, w, b, c, None, disc=None)[0]

    def peer(u: Tensor, w: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return diagonal_scan_ref(u, w, b, c, None, disc=None)[0]

    benchmark.compare(case, ours, "diagonal_scan_ref", peer, inputs, flops, tolerance=1e-4)
    benchmark.compare_threads(case, ours, inputs)


def main() -> None:
    benchmark = Benchmark(__doc__)
    H, N, L = (16, 8, 128) if benchmark.quick else (512, 32, 4096)
    kernels(benchmark, rows_that_fit(H, N, L), N, L)
    scans(benchmark, *((2, 16, 4, 128) if benchmark.quick else (4, 256, 16, 1024)))


if __name__ == "__main__":
    main()
