"""Attention masks, which mean the same to every module."""

from torch import Tensor


def real_tokens(attention_mask: Tensor | None, x: Tensor) -> Tensor | None:
    """attention_mask (B, L), True or 1 at real tokens of x (B, L, D), as a bool tensor; None means all are real.

    Raises:
        ValueError: a mask of another shape.
    """
    if attention_mask is None:
        return None
    if attention_mask.shape != x.shape[:2]:
        raise ValueError(f"attention_mask has shape {list(attention_mask.shape)}, expected {list(x.shape[:2])}, (B, L)")
    return attention_mask.bool()
