"""long_conv against torch.fft over the whole tensor, causal and two-sided."""

import math

import torch
import torch.nn.functional as F
from timing import Benchmark
from torch import Tensor

from spade_ext.ops import long_conv


def whole_tensor_fft(u: Tensor, k: Tensor, skip: Tensor, k_reverse: Tensor | None = None) -> Tensor:
    """The published S4 layer's convolution."""
    L = u.size(-1)
    if k_reverse is not None:
        k = F.pad(k, (0, L)) + F.pad(k_reverse.flip(-1), (L, 0))
    product = torch.fft.rfft(u, n=2 * L).unsqueeze(1) * torch.fft.rfft(k, n=2 * L)
    return torch.fft.irfft(product, n=2 * L)[..., :L] + skip[..., None] * u.unsqueeze(1)


def flops(B: int, H: int, L: int) -> tuple[float, float]:
    """Forward and backward, C = 1, transforms of 2 L."""
    transform, product = 2.5 * 2 * L * math.log2(2 * L), 6 * L
    return H * ((2 * B + 1) * transform + B * product), H * ((3 * B + 2) * transform + 2 * B * product)


def main() -> None:
    benchmark = Benchmark(__doc__)
    for B, H, L in [(2, 16, 128)] if benchmark.quick else [(8, 512, 4096), (3, 1024, 3072)]:
        for direction in ("causal", "two-sided"):
            case = f"{direction}, B {B} H {H} L {L}"
            inputs = [torch.randn(B, H, L), torch.randn(1, H, L), torch.randn(1, H)]
            if direction == "two-sided":
                inputs.append(torch.randn(1, H, L))
            benchmark.compare(case, long_conv, "torch.fft", whole_tensor_fft, inputs, flops(B, H, L), tolerance=1e-5)
            benchmark.compare_threads(case, long_conv, inputs)


if __name__ == "__main__":
    main()
