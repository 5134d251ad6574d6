"""s4_kernel (HiPPO-LegS, rank 1; float64 inside) against a Cauchy matrix in complex64, and against s4_kernel_ref."""

import math
import os

import torch
from timing import Benchmark, Op
from torch import Tensor

from spade_ext.nn.hippo import dplr
from spade_ext.ops import s4_kernel, s4_kernel_ref


def cauchy(w: Tensor, p: Tensor, b: Tensor, c: Tensor, log_dt: Tensor, length: int) -> Tensor:
    """The published S4 kernel for rank 1, (2, 1 + C, H, N, length / 2 + 1) in memory."""
    w, p, b, c = map(torch.view_as_complex, (w, p, b, c))
    omega = torch.exp(-2j * math.pi / length * torch.arange(length // 2 + 1, dtype=torch.float64))
    z = (2 * (1 - omega) / (1 + omega)).to(w.dtype)
    dt = log_dt.exp()[:, None]
    columns = torch.cat((b, p))[:, None]  # (2, 1, S, N)
    rows = torch.cat((c, p.conj().expand(1, *c.shape[1:])))  # (C + 1, H, N)
    v = ((columns * rows) * dt)[..., None]
    denominator = w.expand_as(c[0])[..., None] * dt[..., None]  # (H, N, 1)
    r = (v / (z - denominator) + v.conj() / (z - denominator.conj())).sum(-2)  # (2, C + 1, H, bins)
    k_hat = r[0, :-1] - r[1, :-1] * r[0, -1:] / (1 + r[1, -1:])
    return torch.fft.irfft(k_hat * (2 / (1 + omega)).to(w.dtype), length)[None]


def channels_that_fit(H: int, nbytes: int) -> int:
    """At most H: eight copies of what a peer holds for a channel take no more than half of the memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(H, memory // 2 // (8 * nbytes))


def main() -> None:
    benchmark = Benchmark(__doc__)

    def run(H: int, N: int, L: int, peer_name: str, peer: Op, tolerance: float) -> None:
        w, p, b = (torch.view_as_real(z.resolve_conj()).float() for z in dplr("legs", 2 * N, rank=1))
        c = torch.randn(1, H, N, 2)
        log_dt = torch.empty(H).uniform_(math.log(1e-3), math.log(1e-1))
        inputs = [w[None], p[:, None], b[None, None], c, log_dt]

        def ours(*inputs: Tensor) -> Tensor:
            return s4_kernel(*inputs, L, nodes=L)

        case = f"C 1 H {H} N {N} L {L}"
        flops = (23 * H * N * L, 66 * H * N * L)  # in float64
        benchmark.compare(case, ours, peer_name, peer, inputs, flops, tolerance)
        benchmark.compare_threads(case, ours, inputs)

    H, N, L = (16, 8, 128) if benchmark.quick else (512, 32, 1024)
    fitting = channels_that_fit(H, 8 * 4 * N * (L // 2 + 1))  # for b, p and c, p
    # Sums in complex64 are that far off in the gradient of log_dt.
    run(fitting, N, L, "Cauchy matrix", lambda *inputs: cauchy(*inputs, L), tolerance=1e-2)

    L = 128 if benchmark.quick else 4096
    fitting = channels_that_fit(H, 8 * 2 * N * L)  # c Abar^l
    run(fitting, N, L, "s4_kernel_ref", lambda *inputs: s4_kernel_ref(*inputs, L, nodes=L), tolerance=1e-3)


if __name__ == "__main__":
    main()
