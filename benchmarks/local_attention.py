"""local_attention against three blocks of keys (LongT5), scaled_dot_product_attention with a dense band mask,
FlexAttention (compiled; no backward on the CPU) and local_attention_ref; over windows, head sizes and dtypes; and
nn.LocalAttention against the layer of LongT5."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from timing import Benchmark, check, forward_backward
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from spade_ext.nn import LocalAttention
from spade_ext.ops import local_attention, local_attention_ref, local_attention_step


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


def flex(L: int, left: int, right: int) -> Callable[..., Tensor]:
    """Compiled, with the bias as its score_mod and the band as its block mask."""
    band = create_block_mask(lambda b, h, i, j: (j - i >= -left) & (j - i <= right), None, None, L, L, device="cpu")

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        def with_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + bias[h, (left + j - i).clamp(0, left + right)]

        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return flex_attention(q, k, v, score_mod=with_bias, block_mask=band, enable_gqa=True).transpose(1, 2)

    return torch.compile(attention, dynamic=False)


def flops(B: int, L: int, H: int, D: int, left: int, right: int) -> tuple[float, float]:
    """Forward and backward: two and five products of 2 D a pair that is seen."""
    pairs = sum(min(i + right, L - 1) - max(i - left, 0) + 1 for i in range(L))
    return 4 * D * B * H * pairs, 10 * D * B * H * pairs


def steps(benchmark: Benchmark, B: int, H: int, Hkv: int, D: int, window: int, dtype: torch.dtype) -> None:
    """A token against full rings of `window` keys, as many of them, one after the other, as no cache holds."""
    q, (k, v) = torch.randn(B, H, D, dtype=dtype), torch.randn(2, B, Hkv, D, dtype=dtype)
    nbytes = 2 * B * window * Hkv * D * dtype.itemsize
    count = 2 if benchmark.quick else -(-(128 << 20) // nbytes)
    rings = torch.randn(count, 2, B, window, Hkv, D).to(dtype)
    position = torch.full((B,), 3 * window)

    def ours() -> list[Tensor]:
        return [local_attention_step(q, k, v, None, *ring, position) for ring in rings]

    def peer() -> list[Tensor]:
        attend = partial(F.scaled_dot_product_attention, q[:, :, None], enable_gqa=True)
        return [attend(*(t.transpose(1, 2) for t in ring)).squeeze(2) for ring in rings]

    case = f"step, B {B} H {H}/{Hkv} D {D}, {window} keys, {str(dtype).removeprefix('torch.')}"
    check(case, "SDPA", ours(), peer(), tolerance=1e-5 if dtype == torch.float32 else 0.03)
    seconds = {side: time / count for side, time in benchmark.medians(ours=ours, peer=peer).items()}
    benchmark.row(case, "forward", seconds, "SDPA, no new key", 4 * B * H * D * window, nbytes)


def main() -> None:
    from longt5 import LongT5Layer  # imports transformers, which lengths.py does without

    benchmark = Benchmark(__doc__)
    quick = benchmark.quick

    def make(
        B: int, L: int, H: int, Hkv: int, D: int, window: tuple[int, int]
    ) -> tuple[str, list[Tensor], tuple[float, float], Callable[..., Tensor]]:
        """A case's name, q, k, v and bias, its flops, and ours."""
        case = f"B {B} L {L} H {H}/{Hkv} D {D} window {window}"
        inputs = [torch.randn(B, L, heads, D) for heads in (H, Hkv, Hkv)]
        bias = torch.randn(H, sum(window) + 1)
        return case, [*inputs, bias], flops(B, L, H, D, *window), partial(local_attention, window=window)

    shapes = [
        (1, 3072, 8, 8, 128, (511, 0)),
        (8, 1024, 4, 4, 64, (127, 127)),
        (4, 4096, 8, 8, 64, (127, 127)),
        (32, 1024, 4, 2, 16, (33, 33)),
    ]
    for shape in [(1, 100, 2, 2, 16, (31, 0))] if quick else shapes:
        case, inputs, work, ours = make(*shape)
        L, window = shape[1], shape[-1]
        args = (inputs, work, 1e-5)
        benchmark.compare(f"{case}, bias", ours, "three blocks", three_blocks(L, *window), *args)
        benchmark.compare(f"{case}, bias", ours, "FlexAttention", flex(L, *window), *args, backward=False)
        benchmark.compare(case, ours, "SDPA, band mask", dense_band(L, *window), inputs[:3], work, 1e-5)
        benchmark.compare_threads(f"{case}, bias", ours, inputs)

    shape = (2, 96, 2, 1, 16, (5, 5)) if quick else (1, 1024, 8, 8, 64, (127, 127))
    case, inputs, work, ours = make(*shape)
    ref = partial(local_attention_ref, window=shape[-1])
    benchmark.compare(f"{case}, bias", ours, "local_attention_ref", ref, inputs, work, 1e-5)

    B, L, H = (1, 96, 2) if quick else (2, 2048, 4)
    sweep = [(B, L, H, H, 64, (w, w)) for w in ((8, L - 1) if quick else (16, 32, 64, 256, 512, L - 1))]
    sweep += [(B, L, H, H, D, (127, 127)) for D in ((16,) if quick else (16, 32, 128, 256))]
    for shape in sweep:
        case, inputs, work, ours = make(*shape)
        benchmark.compare(case, ours, "SDPA, band mask", dense_band(L, *shape[-1]), inputs[:3], work, 1e-5)

    for shape in [(1, 100, 2, 2, 16, (31, 0))] if quick else shapes[:3]:
        case, inputs, work, ours = make(*shape)
        single = [t.requires_grad_() for t in inputs]
        for dtype in (torch.bfloat16, torch.float16):
            half = [t.detach().to(dtype).requires_grad_() for t in inputs]
            grad = torch.randn(*half[0].shape, dtype=dtype)
            calls = {
                "ours": partial(forward_backward, ours, half, grad),
                "peer": partial(forward_backward, ours, single, grad.float()),
            }
            name = f"{case}, bias, {str(dtype).removeprefix('torch.')}"
            check(name, "ours in float32", *(call() for call in calls.values()), tolerance=0.05)
            with torch.no_grad():
                seconds = benchmark.medians(ours=partial(ours, *half), peer=partial(ours, *single))
            benchmark.row(name, "forward", seconds, "ours, float32", work[0])
            benchmark.row(name, "forward + backward", benchmark.medians(**calls), "ours, float32", sum(work))

    for shape in [(2, 4, 2, 16, 31)] if quick else [(1, 8, 8, 64, 512), (1, 16, 4, 64, 2048), (8, 8, 8, 64, 512)]:
        for dtype in (torch.float32, torch.bfloat16):
            steps(benchmark, *shape, dtype)

    B, L, D, H, radius = (1, 96, 32, 2, 7) if quick else (4, 4096, 512, 8, 127)
    layer = LocalAttention(D, H, window=(radius, radius))
    attention = flops(B, L, H, D // H, radius, radius)
    work = tuple(n + projections * 8 * B * L * D * D for n, projections in zip(attention, (1, 2), strict=True))
    case = f"nn.LocalAttention, B {B} L {L} D {D} H {H} window {layer.window}"
    benchmark.compare_modules(case, layer, "layer of LongT5", LongT5Layer(layer, L), torch.randn(B, L, D), 1e-4, work)


if __name__ == "__main__":
    main()
