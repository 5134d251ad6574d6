"""Local attention: every query sees a window of keys around its own position."""

import torch
from torch import Tensor


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    window: tuple[int, int] | None = None,
    causal: bool = False,
    attention_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    r"""Softmax attention over a window, with a relative position bias that gets a gradient.

    Query i stands at position p(i) = i + Lk - Lq and sees key j when p(i) - left <= j <= p(i) + right. Scores are
    ``scale * q . k + bias[h, left + j - p(i)]``. A query that sees no key gives exactly 0.

    Args:
        q: (B, Lq, H, D), float64, float32, float16 or bfloat16, any strides (rows are copied unless contiguous).
        k: (B, Lk, Hkv, D); Hkv divides H, query head h reads key head h // (H / Hkv).
        v: (B, Lk, Hkv, Dv).
        bias: (H, left + right + 1), entry left + j - p(i); without a window (H, Lq + Lk - 1), entry Lk - 1 + j - p(i).
        window: (left, right), in tokens; None is a full row.
        causal: no key after p(i). With a window its right must be 0, which says the same.
        attention_mask: (B, Lk), True or 1 at real tokens.
        scale: 1 / sqrt(D) unless given.

    Returns:
        (B, Lq, H, Dv), contiguous. Memory and that of the backward is O(B L H D); work O(B L H D (left + right + 1)).

    Raises:
        ValueError, TypeError: a shape, dtype, device or window that does not fit, named in one sentence.

    Source: SPADE (arXiv 2212.08136), section 3.2; T5 (arXiv 1910.10683), section 2.1, for the bias.
    """
    if window is not None and not (isinstance(window, (tuple, list)) and all(isinstance(side, int) for side in window)):
        raise TypeError(f"local_attention: window is {window!r}, expected (left, right), two ints, or None")
    if attention_mask is not None and not attention_mask.is_floating_point():
        attention_mask = attention_mask.bool()
    return torch.ops.spade_ext.local_attention(q, k, v, bias, attention_mask, window, causal, scale)


def local_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    window: tuple[int, int] | None = None,
    causal: bool = False,
    attention_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`local_attention` by a dense (B, H, Lq, Lk) matrix of scores."""
    (Lq, H, D), (Lk, Hkv) = q.shape[1:], k.shape[1:3]
    left, right = window if window is not None else (Lk - 1, Lq - 1)
    k, v = (t.repeat_interleave(H // Hkv, dim=2) for t in (k, v))
    offset = torch.arange(Lk, device=q.device) - (torch.arange(Lq, device=q.device) + Lk - Lq)[:, None]  # j - p(i)

    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (D**-0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias[:, (left + offset).clamp(0, bias.size(1) - 1)]
    seen = (offset >= -left) & (offset <= (0 if causal else right))
    if attention_mask is not None:
        seen = seen & attention_mask.bool()[:, None, None]
    seen = seen.expand_as(scores)
    p = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    p = p.masked_fill(~seen.any(-1, keepdim=True), 0)
    return torch.einsum("bhij,bjhd->bihd", p, v)
