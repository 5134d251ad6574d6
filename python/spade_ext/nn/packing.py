"""Packed rows: several documents one after the other in a row, told apart by `segment_ids`."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Documents:
    """The documents of a batch of packed rows.

    A document is a run of equal ids of a row, from its first to its last real token.

    Args:
        segment_ids: (B, L), integers.
        mask: (B, L), bool, True at real tokens; None means all are real.

    Attributes:
        row: (documents,), the row that each stands in.
        lengths: (documents,), in tokens.
    """

    def __init__(self, segment_ids: Tensor, mask: Tensor | None):
        self.shape = segment_ids.shape
        changes = torch.ones_like(segment_ids, dtype=torch.bool)
        changes[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
        runs = changes.flatten().cumsum(0) - 1
        self.tokens = torch.arange(runs.numel(), device=runs.device)  # flat positions, (T,)
        if mask is not None:
            real, last = self.tokens[mask.flatten()], runs.numel() - 1
            begins = torch.full_like(runs, last + 1).scatter_reduce(0, runs[real], real, "amin")
            ends = torch.full_like(runs, -1).scatter_reduce(0, runs[real], real, "amax")
            self.tokens = self.tokens[(self.tokens >= begins[runs]) & (self.tokens <= ends[runs])]
        _, self.document, self.lengths = runs[self.tokens].unique_consecutive(return_inverse=True, return_counts=True)
        first = self.lengths.cumsum(0) - self.lengths  # (documents,)
        self.position = torch.arange(len(self.tokens), device=runs.device) - first[self.document]
        self.row = self.tokens[first] // max(self.shape[1], 1)

    def groups(self, *, equal: bool) -> list[Tensor]:
        """Indices of documents of equal lengths; or of lengths that differ by less than a factor of two."""
        keys = self.lengths if equal else self.lengths.double().log2().ceil()
        return [(keys == key).nonzero().squeeze(1) for key in keys.unique()]

    def gather(self, x: Tensor, documents: Tensor) -> Tensor:
        """Of x (B, L, D) these documents, (documents, longest, D), followed by zeros."""
        rank, position, tokens = self._places(documents)
        out = x.new_zeros(len(documents), int(self.lengths[documents].max()), x.size(-1))
        return out.index_put((rank, position), x.flatten(0, 1)[tokens])

    def scatter(self, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """(B, L, E) from documents and their outputs (documents, longest, E); 0 elsewhere."""
        places = [self._places(documents) for documents, _ in parts]
        values = [y[rank, position] for (_, y), (rank, position, _) in zip(parts, places, strict=True)]
        out = values[0].new_zeros(self.shape.numel(), values[0].size(-1))
        tokens = torch.cat([tokens for _, _, tokens in places])
        return out.index_put((tokens,), torch.cat(values)).unflatten(0, self.shape)

    def _places(self, documents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the tokens of these documents: which of them, the position in it, and in the batch."""
        rank = torch.full_like(self.lengths, -1)
        rank[documents] = torch.arange(len(documents), device=rank.device)
        of_token = rank[self.document]
        chosen = of_token >= 0
        return of_token[chosen], self.position[chosen], self.tokens[chosen]
