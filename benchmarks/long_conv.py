"""long_conv against torch.fft over the whole tensor: causal and two-sided, u contiguous and transposed (B, L, H); and
against long_conv_ref."""

import math

import torch
import torch.nn.functional as F
from timing import Benchmark
from torch import Tensor

from spade_ext.ops import long_conv, long_conv_ref


def whole_tensor_fft(u: Tensor, k: Tensor, skip: Tensor, k_reverse: Tensor | None = None) -> Tensor:
    """The published S4 layer's convolution."""
    L = u.size(-1)
    if k_reverse is not None:
        k = F.pad(k, (0, L)) + F.pad(k_reverse.flip(-1), (L, 0))
    product = torch.fft.rfft(u, n=2 * L).unsqueeze(1) * torch.fft.rfft(k, n=2 * L)
    return torch.fft.irfft(product, n=2 * L)[..., :L] + skip[..., None] * u.unsqueeze(1)


def flops(B: int, H: int, L: int) -> tuple[float, float]:
    """Forward and backward, C = 1, transforms of n = 2 L."""
    n = 2 * L
    transform = 2.5 * n * math.log2(n)
    return H * ((2 * B + 1) * transform + 7 * n * B), H * ((3 * B + 2) * transform + 15 * n * B)


def arguments(B: int, H: int, L: int, *, two_sided: bool = False, transposed: bool = False) -> list[Tensor]:
    u = torch.randn(B, L, H).mT if transposed else torch.randn(B, H, L)
    kernels = [torch.randn(1, H, L), torch.randn(1, H)]
    return [u, *kernels, torch.randn(1, H, L)] if two_sided else [u, *kernels]


VARIANTS = {"causal": {}, "causal, (B, L, H)": {"transposed": True}, "two-sided": {"two_sided": True}}


def main() -> None:
    benchmark = Benchmark(__doc__)
    for B, H, L in [(2, 16, 128)] if benchmark.quick else [(8, 512, 4096), (3, 1024, 3072), (2, 512, 16384)]:
        for name, options in VARIANTS.items():
            case = f"{name}, B {B} H {H} L {L}"
            inputs = arguments(B, H, L, **options)
            benchmark.compare(case, long_conv, "torch.fft", whole_tensor_fft, inputs, flops(B, H, L), tolerance=1e-5)
            benchmark.compare_threads(case, long_conv, inputs)
    B, H, L = (2, 16, 128) if benchmark.quick else (2, 32, 2048)
    case = f"causal, B {B} H {H} L {L}"
    benchmark.compare(
        case, long_conv, "long_conv_ref", long_conv_ref, arguments(B, H, L), flops(B, H, L), tolerance=1e-5
    )


if __name__ == "__main__":
    main()
