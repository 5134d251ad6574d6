# Copyright 2026 The spade-ext developers.
"""Large vocabularies: adaptive input and softmax, and a loss that never holds all logits."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init

from ..nn.linear import Linear, linear

if TYPE_CHECKING:
    from .configuration_spade import SpadeConfig

IGNORED = -100
LOGITS_AT_ONCE = 2**23
COMPILED_PARTS = 4


def sum_of_losses(head: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    """The sum of -log softmax(head(x)) at the labels, 0 at those of -100.

    The logits (T, n_classes) are made for a few tokens at a time, and once more in the backward. When compiling, the
    tokens are in `COMPILED_PARTS`, so that one graph serves every number of them.

    Args:
        head: (t, D) to (t, n_classes).
        x: (T, D).
        labels: (T,), int64.
    """

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        logits = head(x)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return nn.functional.cross_entropy(wide, labels, ignore_index=IGNORED, reduction="sum")

    if torch.compiler.is_compiling():
        missing = -x.size(0) % COMPILED_PARTS
        x = pad(x, (0, 0, 0, missing)).unflatten(0, (COMPILED_PARTS, -1))
        labels = pad(labels, (0, missing), value=IGNORED).unflatten(0, (COMPILED_PARTS, -1))
        parts = zip(x, labels, strict=True)
    else:
        tokens = max(1, LOGITS_AT_ONCE // n_classes)
        parts = zip(x.split(tokens), labels.split(tokens), strict=True)
    return torch.stack([checkpoint(loss, *part, use_reentrant=False) for part in parts]).sum()


class AdaptiveBand(nn.Module):
    """An embedding of `size` ids, narrow, and its projection to the model's width."""

    def __init__(self, size: int, dim: int, width: int, padding_idx: int | None):
        super().__init__()
        self.embedding = nn.Embedding(size, dim, padding_idx=padding_idx)
        self.projection = Linear(dim, width, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.projection(self.embedding(ids))


class AdaptiveEmbedding(nn.Module):
    """Embeds frequent ids widely and rare ones narrowly.

    The ids of a band begin at its cutoff; band i is D / factor^i wide, and every band is projected to D.

    Source: adaptive input representations (arXiv 1809.10853), section 3, and fairseq.
    """

    def __init__(self, config: "SpadeConfig"):
        super().__init__()
        width = config.hidden_size
        self.starts = (0, *config.adaptive_cutoffs)
        self.ends = (*config.adaptive_cutoffs, config.vocab_size)
        self.padding_idx = config.pad_token_id
        self.bands = nn.ModuleList(
            AdaptiveBand(
                end - start,
                width // config.adaptive_factor**index,
                width,
                config.pad_token_id if index == 0 else None,
            )
            for index, (start, end) in enumerate(self.ranges())
        )

    def ranges(self) -> Iterator[tuple[int, int]]:
        """The first id of each band, and that after its last one."""
        return zip(self.starts, self.ends, strict=True)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Embeddings normal with standard deviation dim^-0.5, the padding's row 0 in every band; Xavier uniform."""
        for band in self.bands:
            weight = band.embedding.weight
            init.normal_(weight, std=weight.size(1) ** -0.5)
            row = self.padding_idx
            if row is not None and row < weight.size(0) and not getattr(weight, "_is_hf_initialized", False):
                weight[row].zero_()
            init.xavier_uniform_(band.projection.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, L) to (B, L, D). Every band embeds every token, so that shapes do not depend on ids."""
        out = None
        for band, (start, end) in zip(self.bands, self.ranges(), strict=True):
            # Ids out of the vocabulary stay so, for nn.Embedding to refuse.
            lowest, highest = start or None, end - 1 if end < self.ends[-1] else None
            embedded = band(ids.clamp(lowest, highest) - start)
            out = embedded if out is None else torch.where((ids >= start)[..., None], embedded, out)
        return out


class AdaptiveHead(nn.Module):
    """The adaptive softmax whose words are those of an `AdaptiveEmbedding`.

    Band 0 and one class for each of the other bands make the head; a rare word is its band's class and a word in it.

    Source: efficient softmax approximation (arXiv 1609.04309); fairseq with tied weights and projections.
    """

    def __init__(self, config: "SpadeConfig"):
        super().__init__()
        self.bands = Linear(config.hidden_size, len(config.adaptive_cutoffs), bias=False)
        self.dropout = nn.Dropout(config.adaptive_dropout)

    def reset_parameters(self) -> None:
        init.xavier_uniform_(self.bands.weight)

    def head(self, x: Tensor, embedding: AdaptiveEmbedding) -> Tensor:
        """(T, D) to (T, first cutoff + bands)."""
        return torch.cat([linear(x, embedding.bands[0].embedding.weight), self.bands(x)], dim=-1)

    def tail(self, x: Tensor, band: AdaptiveBand) -> Tensor:
        """(T, D) to (T, ids of the band)."""
        return linear(self.dropout(linear(x, band.projection.weight.T)), band.embedding.weight)

    def loss(self, x: Tensor, labels: Tensor, embedding: AdaptiveEmbedding) -> Tensor:
        """The sum of -log p of labels (T,) after x (T, D), 0 at labels of -100."""
        x = self.dropout(x)
        first = embedding.ends[0]
        rare, in_head = [], labels
        for index, (start, end) in enumerate(list(embedding.ranges())[1:]):
            inside = (labels >= start) & (labels < end)
            in_head = torch.where(inside, first + index, in_head)
            tokens, band = inside.nonzero().squeeze(1), embedding.bands[index + 1]
            tail = lambda x, band=band: self.tail(x, band)  # noqa: E731
            rare.append(sum_of_losses(tail, x[tokens], labels[tokens] - start, end - start))
        n_classes = first + len(rare)
        return sum(rare, sum_of_losses(lambda x: self.head(x, embedding), x, in_head, n_classes))

    def forward(self, x: Tensor, embedding: AdaptiveEmbedding) -> Tensor:
        """log p of every id, (..., D) to (..., vocab_size)."""
        first = embedding.ends[0]
        frequent, bands = self.head(x, embedding).log_softmax(-1).tensor_split([first], dim=-1)
        tails = [
            self.tail(x, band).log_softmax(-1) + bands[..., index, None]
            for index, band in enumerate(list(embedding.bands)[1:])
        ]
        return torch.cat([frequent, *tails], dim=-1)
