"""Attention masks and segment ids, which mean the same to every module."""

import torch
from torch import Tensor, nn


def real_tokens(attention_mask: Tensor | None, x: Tensor) -> Tensor | None:
    """attention_mask (B, L), True or 1 at real tokens of x (B, L, D), as a bool tensor; None means all are real.

    Raises:
        ValueError, TypeError: another shape; neither bool nor integers, such as a mask to be added to scores.
    """
    if attention_mask is None:
        return None
    _check_shape("attention_mask", attention_mask, x)
    if attention_mask.is_floating_point() or attention_mask.is_complex():
        raise TypeError(f"attention_mask is {attention_mask.dtype}, expected bool or integers, 1 at real tokens")
    return attention_mask.bool()


def ends_are_real(mask: Tensor) -> bool:
    """Whether all padding of mask (B, L) is before the real tokens of its row."""
    return bool((mask[:, 1:] | ~mask[:, :-1]).all())


def padding_is_outside(mask: Tensor) -> bool:
    """Whether no row of mask (B, L), True at real tokens, has padding between them."""
    ends = (mask & ~nn.functional.pad(mask[:, 1:], (0, 1))).sum(1)
    return bool((ends <= 1).all())


def real_token(attention_mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Like `real_tokens`, of one token a row: attention_mask (B,) of x (B, D)."""
    return None if attention_mask is None else real_tokens(attention_mask[:, None], x[:, None]).squeeze(1)


def matching_ids(segment_ids: Tensor | None, x: Tensor) -> Tensor | None:
    """segment_ids (B, L) of x (B, L, D), integers: neighbours with equal ids belong to one document.

    Raises:
        ValueError, TypeError: another shape, or no integers.
    """
    if segment_ids is None:
        return None
    _check_shape("segment_ids", segment_ids, x)
    if segment_ids.is_floating_point() or segment_ids.is_complex() or segment_ids.dtype == torch.bool:
        raise TypeError(f"segment_ids is {segment_ids.dtype}, expected integers")
    return segment_ids


def ids_or_rows(segment_ids: Tensor | None, mask: Tensor) -> Tensor:
    """segment_ids (B, L), or where there are none those of one document a row."""
    return torch.zeros_like(mask, dtype=torch.long) if segment_ids is None else segment_ids


def _check_shape(name: str, t: Tensor, x: Tensor) -> None:
    if t.shape != x.shape[:2]:
        raise ValueError(f"{name} has shape {list(t.shape)}, expected {list(x.shape[:2])}, (B, L)")
