"""Scan or convolution: diagonal_scan against diagonal_kernel and long_conv, for the limit on N at which modules change.

B 4, H 256, (B, L, H) in memory, forward + backward; 2 N real numbers count for N complex ones. The modules' choice is
`SCAN_LIMIT` in spade_ext/nn/state_space.py, of one direction here.
"""

import torch
from timing import Benchmark, forward_backward
from torch import Tensor

from spade_ext.nn.state_space import SCAN_LIMIT
from spade_ext.ops import diagonal_kernel, diagonal_scan, long_conv

REALS = [(1, 4096), (2, 1024), (4, 4096), (16, 512), (16, 4096), (16, 16384), (32, 4096), (64, 4096)]
PAIRS = [(1, 4096), (4, 4096), (8, 4096), (32, 4096)]


def scan(x: Tensor, w: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return diagonal_scan(x.mT, w, b, c[None], None, disc=None)[0].squeeze(1).mT


def convolution(x: Tensor, w: Tensor, b: Tensor, c: Tensor) -> Tensor:
    product = b * c if w.dim() == 2 else torch.view_as_real(torch.view_as_complex(b) * torch.view_as_complex(c))
    return long_conv(x.mT, diagonal_kernel(w, product[None], None, x.size(1), disc=None).squeeze(0)).mT


def main() -> None:
    benchmark = Benchmark(__doc__)
    B, H = (1, 16) if benchmark.quick else (4, 256)
    for kind, shapes in (("real", REALS), ("complex", PAIRS)):
        for N, L in shapes:
            L = 128 if benchmark.quick else L
            pair = () if kind == "real" else (2,)
            w = -torch.rand(H, N, *pair)
            inputs = [torch.randn(B, L, H), w, torch.randn_like(w), torch.randn_like(w)]
            inputs = [t.requires_grad_() for t in inputs]
            grad = torch.randn(B, L, H)
            seconds = benchmark.medians(
                ours=lambda inputs=inputs, grad=grad: forward_backward(scan, inputs, grad),
                peer=lambda inputs=inputs, grad=grad: forward_backward(convolution, inputs, grad),
            )
            rows = N if kind == "real" else 2 * N
            name = "forward + backward, " + ("scan" if rows <= SCAN_LIMIT else "convolution") + " picked"
            benchmark.row(f"{kind} N {N} L {L}", name, seconds, "convolution", (8 * rows + 24) * 2 * B * H * L)


if __name__ == "__main__":
    main()
