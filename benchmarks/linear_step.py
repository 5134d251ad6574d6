"""linear_step against torch's Linear, for the weights of SpadeConfig.preset("wikitext103"), as many of a shape as do
not stay in the CPU's caches."""

from collections.abc import Callable

import torch
from timing import Benchmark
from torch import Tensor
from torch.nn.functional import linear

from spade_ext.ops import linear_step

SHAPES = {"qkv": (3072, 1024), "o": (1024, 1024), "fc1": (4096, 1024), "fc2": (1024, 4096)}  # (N, K)


def rows(benchmark: Benchmark, name: str, N: int, K: int, B: int, dtype: torch.dtype, tolerance: float) -> None:
    count = max(2, 2**17 // (N * K)) if benchmark.quick else 2**26 // (N * K)
    inputs = [torch.randn(B, K).to(dtype), (torch.randn(count, N, K) / K**0.5).to(dtype)]

    def all_of(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, weights: torch.stack([op(x, weight) for weight in weights])

    case = f"{name}, {count} weights ({N}, {K}), {B} rows, {str(dtype).removeprefix('torch.')}"
    flops = 2 * B * N * K * count
    benchmark.compare(case, all_of(linear_step), "Linear", all_of(linear), inputs, (flops, 0), tolerance, False)


def main() -> None:
    benchmark = Benchmark(__doc__)
    shapes = {"small": (64, 96)} if benchmark.quick else SHAPES
    for dtype, tolerance in {torch.float32: 1e-5, torch.bfloat16: 1e-2}.items():
        for name, (N, K) in shapes.items():
            for B in (1, 2, 4, 8, 16):
                rows(benchmark, name, N, K, B, dtype, tolerance)


if __name__ == "__main__":
    main()
