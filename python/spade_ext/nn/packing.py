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
        begin: (documents,), the position of its first token in the flattened batch.
        lengths: (documents,), in tokens.
    """

    def __init__(self, segment_ids: Tensor, mask: Tensor | None):
        self.shape = segment_ids.shape
        changes = torch.ones_like(segment_ids, dtype=torch.bool)
        changes[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
        runs = changes.flatten().cumsum(0) - 1
        tokens = torch.arange(runs.numel(), device=runs.device)  # flat positions
        if mask is not None:
            real, last = tokens[mask.flatten()], runs.numel() - 1
            begins = torch.full_like(runs, last + 1).scatter_reduce(0, runs[real], real, "amin")
            ends = torch.full_like(runs, -1).scatter_reduce(0, runs[real], real, "amax")
            tokens = tokens[(tokens >= begins[runs]) & (tokens <= ends[runs])]
        _, self.lengths = runs[tokens].unique_consecutive(return_counts=True)
        self.begin = tokens[self.lengths.cumsum(0) - self.lengths]
        self.row = self.begin // max(self.shape[1], 1)

    def groups(self) -> list[Tensor]:
        """Indices of documents of equal lengths."""
        return [(self.lengths == length).nonzero().squeeze(1) for length in self.lengths.unique()]

    def gather(self, x: Tensor, documents: Tensor) -> Tensor:
        """Of x (B, L, D) these documents, of one length: (documents, length, D)."""
        return x.flatten(0, 1)[self._tokens(documents)]

    def scatter(self, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """(B, L, E) from documents and their outputs (documents, length, E); 0 elsewhere."""
        tokens = torch.cat([self._tokens(documents).flatten() for documents, _ in parts])
        values = torch.cat([y.flatten(0, 1) for _, y in parts])
        out = values.new_zeros(self.shape.numel(), values.size(-1))
        return out.index_put((tokens,), values).unflatten(0, self.shape)

    def _tokens(self, documents: Tensor) -> Tensor:
        """(documents, length), the flat positions of their tokens."""
        length = int(self.lengths[documents[0]])
        return self.begin[documents][:, None] + torch.arange(length, device=documents.device)
