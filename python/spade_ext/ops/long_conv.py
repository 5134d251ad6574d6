"""Long convolution: the product of a sequence with a kernel as long as itself."""

import torch
from torch import Tensor


def long_conv(
    u: Tensor,
    k: Tensor,
    skip: Tensor | None = None,
    k_reverse: Tensor | None = None,
    segment_ids: Tensor | None = None,
) -> Tensor:
    r"""Causal or two-sided convolution along the last dimension.

    ``y[b,c,h,t] = sum_{s<=t} k[c,h,t-s] u[b,h,s] + skip[c,h] u[b,h,t] + sum_{s>t} k_reverse[c,h,s-t-1] u[b,h,s]``

    Args:
        u: (B, H, L), any strides, float32 or float64.
        k: (C, H, Lk) or (H, Lk). A kernel shorter than L acts as zero beyond its end, a longer one is cut.
        skip: (C, H) or (H,).
        k_reverse: (C, H, Lr) or (H, Lr); its entry 0 is the weight of the next token (lag -1).
        segment_ids: (B, L), integers, of packed rows: a run of equal ids is a document, convolved as it is alone.

    Returns:
        (B, C, H, L), or (B, H, L) for kernels without C, in u's layout: where u is a transposed contiguous
        (B, L, H), the result is a transposed contiguous (B, L, C, H).

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit, named in one sentence.

    Source: Gu et al., S4 (arXiv 2111.00396), section 2.4; the two-sided convention is the published code's.
    """
    return torch.ops.spade_ext.long_conv(u, k, skip, k_reverse, segment_ids)


def long_conv_ref(
    u: Tensor,
    k: Tensor,
    skip: Tensor | None = None,
    k_reverse: Tensor | None = None,
    segment_ids: Tensor | None = None,
) -> Tensor:
    """`long_conv` as a product with Toeplitz matrices, (B, C, H, L, L) in memory."""
    L = u.size(-1)
    lag = torch.arange(L, device=u.device)[:, None] - torch.arange(L, device=u.device)  # t - s

    def toeplitz(kernel: Tensor, lag: Tensor) -> Tensor:
        seen = (lag >= 0) & (lag < kernel.size(-1))
        weights = (
            kernel[..., lag.clamp(0, max(kernel.size(-1) - 1, 0))]
            if kernel.size(-1)
            else kernel.sum(-1)[..., None, None]
        )
        return torch.where(seen, weights, 0)

    matrix = toeplitz(k, lag)
    if k_reverse is not None:
        matrix = matrix + toeplitz(k_reverse, -lag - 1)
    matrix = matrix.expand(u.size(0), *matrix.shape)
    if segment_ids is not None:
        document = document_numbers(segment_ids)
        together = document[:, :, None] == document[:, None, :]
        matrix = matrix * together.view(len(u), *(1,) * (k.dim() - 1), L, L)
    y = torch.einsum("bchts,bhs->bcht" if k.dim() == 3 else "bhts,bhs->bht", matrix, u)
    if skip is not None:
        y = y + skip[..., None] * (u[:, None] if k.dim() == 3 else u)
    return y


def document_numbers(segment_ids: Tensor) -> Tensor:
    """For the references: (B, L), which run of equal ids of its row a token is in."""
    changes = torch.zeros_like(segment_ids, dtype=torch.long)
    changes[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return changes.cumsum(1)
