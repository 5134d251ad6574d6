"""local_attention against three blocks of keys (LongT5) and scaled_dot_product_attention with a dense band mask."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timing import Benchmark
from torch import Tensor

from spade_ext.ops import local_attention


def three_blocks(L: int, left: int, right: int) -> Callable[..., Tensor]:
    """Blocks of w + 1 queries, w = max(left, right), against the keys of the previous, the own and the next block.

    As in LongT5, what does not depend on the call (mask and relative positions) is made once, outside of it.
    """
    size = max(left, right) + 1
    blocks = -(-L // size)
    pad = blocks * size - L
    key = torch.arange(3 * size) - size  # from the block's first query
    offset = key - torch.arange(size)[:, None]  # (size, 3 size)
    position = torch.arange(blocks)[:, None] * size + key  # (blocks, 3 size)
    seen = ((offset >= -left) & (offset <= right)) & ((position >= 0) & (position < L))[:, None]
    mask = torch.where(seen, 0.0, -1e10)[:, None]  # (blocks, 1, size, 3 size)
    entry = (left + offset).clamp(0, left + right)

    def neighbours(t: Tensor) -> Tensor:
        t = F.pad(t, (0, 0, 0, 0, size, size + pad)).unflatten(1, (blocks + 2, size))
        return torch.cat((t[:, :-2], t[:, 1:-1], t[:, 2:]), dim=2)  # (B, blocks, 3 size, H, D)

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(q.size(2) // t.size(2), dim=2) for t in (k, v))
        q = F.pad(q * q.size(-1) ** -0.5, (0, 0, 0, 0, 0, pad)).unflatten(1, (blocks, size))
        position_bias = F.embedding(entry, bias.T).permute(2, 0, 1) + mask  # (blocks, H, size, 3 size)
        p = (torch.einsum("bnihd,bnjhd->bnhij", q, neighbours(k)) + position_bias).softmax(-1)
        return torch.einsum("bnhij,bnjhd->bnihd", p, neighbours(v)).flatten(1, 2)[:, :L]

    return attention


def dense_band(L: int, left: int, right: int) -> Callable[..., Tensor]:
    """Without bias: PyTorch's fused kernel gives a mask no gradient."""
    offset = torch.arange(L) - torch.arange(L)[:, None]
    seen = (offset >= -left) & (offset <= right)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True).transpose(1, 2)

    return attention


def flops(B: int, L: int, H: int, D: int, left: int, right: int) -> tuple[float, float]:
    """Forward and backward: two and five products of 2 D a pair that is seen."""
    pairs = sum(min(i + right, L - 1) - max(i - left, 0) + 1 for i in range(L))
    return 4 * D * B * H * pairs, 10 * D * B * H * pairs


def main() -> None:
    benchmark = Benchmark(__doc__)
    shapes = [
        (1, 3072, 8, 8, 128, (511, 0)),
        (8, 1024, 4, 4, 64, (127, 127)),
        (4, 4096, 8, 8, 64, (127, 127)),
        (32, 1024, 4, 2, 16, (33, 33)),
        (8, 1024, 4, 4, 64, (16, 16)),
        (8, 512, 4, 4, 64, (511, 511)),
    ]
    quick_shapes = [(1, 100, 2, 2, 16, (31, 0)), (2, 96, 2, 1, 16, (5, 5))]
    for B, L, H, Hkv, D, window in quick_shapes if benchmark.quick else shapes:
        case = f"B {B} L {L} H {H}/{Hkv} D {D} window {window}"
        inputs = [torch.randn(B, L, heads, D) for heads in (H, Hkv, Hkv)]
        bias = torch.randn(H, sum(window) + 1)
        work = flops(B, L, H, D, *window)

        def ours(
            q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, window: tuple[int, int] = window
        ) -> Tensor:
            return local_attention(q, k, v, bias, window=window)

        peer = three_blocks(L, *window)
        benchmark.compare(f"{case}, bias", ours, "three blocks", peer, [*inputs, bias], work, tolerance=1e-5)
        benchmark.compare(case, ours, "SDPA, band mask", dense_band(L, *window), inputs, work, tolerance=1e-5)
        benchmark.compare_threads(f"{case}, bias", ours, [*inputs, bias])


if __name__ == "__main__":
    main()
