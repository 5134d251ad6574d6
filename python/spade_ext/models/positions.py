# Copyright 2026 The spade-ext developers.
"""Positions that are added to embeddings, and what position_ids say about packed rows."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..nn.mask import ids_or_rows

if TYPE_CHECKING:
    from .configuration_spade import SpadeConfig

FIRST_SINUSOID = 2  # the number of the first token in fairseq, whose padding is token 1


def check_position_ids(position_ids: Tensor, x: Tensor) -> Tensor:
    """position_ids (B, L) or (1, L) of x (B, L, D), as (B, L)."""
    if position_ids.dim() != 2 or position_ids.size(0) not in (1, x.size(0)) or position_ids.size(1) != x.size(1):
        raise ValueError(f"position_ids has shape {list(position_ids.shape)}, expected {list(x.shape[:2])}, (B, L)")
    if position_ids.is_floating_point() or position_ids.is_complex() or position_ids.dtype == torch.bool:
        raise TypeError(f"position_ids is {position_ids.dtype}, expected integers")
    return position_ids.expand(x.shape[:2])


def documents_of(position_ids: Tensor, mask: Tensor | None) -> Tensor | None:
    """segment_ids (B, L) of rows whose position_ids start again at each document; None where each row is one.

    A real token begins a document where its position is 0, or does not follow that of a real token before it. When
    compiling, rows of one document have ids as well: None would depend on data.
    """
    begins = torch.zeros_like(position_ids, dtype=torch.bool)
    jumps = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if mask is None:
        begins[:, 1:] = jumps
    else:
        begins[:, 1:] = mask[:, 1:] & ((jumps & mask[:, :-1]) | (position_ids[:, 1:] == 0))
        begins &= mask.cumsum(1) > 1  # a row's first real token ends no document
    return begins.cumsum(1) if torch.compiler.is_compiling() or begins.any() else None


def positions_of(x: Tensor, mask: Tensor | None, segment_ids: Tensor | None) -> Tensor:
    """The number (B, L) of each real token of x (B, L, D) in its document, from 0; 0 at padding."""
    B, L = x.shape[:2]
    if mask is None and segment_ids is None:
        return torch.arange(L, device=x.device).expand(B, L)
    mask = torch.ones(B, L, dtype=torch.bool, device=x.device) if mask is None else mask
    segment_ids, count = ids_or_rows(segment_ids, mask), mask.cumsum(1)
    begins = torch.zeros_like(mask)
    begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    before = torch.where(begins, count - mask.long(), 0).cummax(1).values  # real tokens before a token's document
    return (count - 1 - before).masked_fill(~mask, 0)


class SpadePositionEmbedding(nn.Module):
    """A vector a position, "learned" or "sinusoidal": sines, then cosines, of D / 2 frequencies from 1 to 1 / 10000.

    Source: arXiv 1706.03762, section 3.5, as in fairseq.
    """

    def __init__(self, config: "SpadeConfig"):
        super().__init__()
        self.width = config.hidden_size
        self.max_positions = None
        if config.position == "learned":
            self.max_positions = config.max_position_embeddings
            self.table = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, positions: Tensor, counted: bool) -> Tensor:
        """(B, L) to (B, L, D); counted positions are those of `positions_of`, others may be any numbers."""
        if self.max_positions is None:
            return self._sinusoids(positions)
        # A look at the numbers waits for the device, and cannot be part of a graph.
        known = counted and positions.size(1) <= self.max_positions
        if positions.numel() and not known and not torch.compiler.is_compiling():
            self._check_range(positions)
        return self.table(positions)

    def _check_range(self, positions: Tensor) -> None:
        first, last = (int(number) for number in positions.aminmax())
        if first < 0 or last >= self.max_positions:
            expected = f"0 to {self.max_positions - 1}, below max_position_embeddings"
            raise ValueError(f"position_ids are from {first} to {last}, expected {expected}")

    def _sinusoids(self, positions: Tensor) -> Tensor:
        half = self.width // 2
        steps = torch.arange(half, dtype=torch.float64, device=positions.device) / (half - 1)
        angles = (positions[..., None] + FIRST_SINUSOID) * 10000**-steps
        return torch.cat([angles.sin(), angles.cos()], dim=-1)
