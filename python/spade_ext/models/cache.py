# Copyright 2026 The spade-ext developers.
"""The cache of a causal SPADE model: what its layers keep of the tokens before."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from transformers.cache_utils import Cache, EncoderDecoderCache

if TYPE_CHECKING:
    from .configuration_spade import SpadeConfig


@dataclass
class SpadeCacheLayer:
    """One layer's state: tensors whose first dimension is B, in the tuples and dicts that the mixer made of them."""

    is_compileable: bool
    state: Any = None  # until the first token

    is_croppable: ClassVar[bool] = False
    supports_early_init: ClassVar[bool] = False


class SpadeCache(Cache):
    """What a causal SPADE model keeps of the tokens before: the states of its layers.

    Those are of state space models and of the last left + 1 keys and values, so that its size does not depend on how
    many tokens there were. Only whole rows (the mixer "full", and "mega" with neither a window nor chunks) keep all
    keys. Each row is one document, until `reset`. Padding leaves nothing behind.

    Args:
        config: of the model that it is for.

    Attributes:
        layers: the states, one a layer.
        positions: (B,), int64, how many real tokens each row has had; None before the first token.
        tokens: int64, on the CPU, how many there were in each row, padding included.
    """

    layers: list[SpadeCacheLayer]

    def __init__(self, config: "SpadeConfig"):
        if reason := config.why_no_cache():
            raise ValueError(f"config has {reason}, expected a model that can have a cache")
        super().__init__(layers=[SpadeCacheLayer(config.has_constant_states) for _ in range(config.num_hidden_layers)])
        self.positions: Tensor | None = None
        self.tokens = torch.zeros((), dtype=torch.long)  # a tensor, so that compiled steps do not depend on its value

    def mask_of_new_tokens(self, attention_mask: Tensor, length: int) -> Tensor:
        """The last `length` tokens of attention_mask (B, tokens + length).

        Raises:
            ValueError: other tokens before them are real than those that the states have read, such as those that
                generation appended to a row that had ended.
        """
        before = attention_mask.size(1) - length
        # Steps are not checked: time and waiting for the device would grow with the tokens before.
        if length > 1 and self.positions is not None and not torch.compiler.is_compiling():
            real = attention_mask[:, :before].bool().sum(1)
            if (differs := real != self.positions).any():
                row = int(differs.nonzero()[0])
                raise ValueError(
                    f"attention_mask has {int(real[row])} real tokens before the new ones in row {row}, expected the "
                    f"{int(self.positions[row])} that the cache has read"
                )
        return attention_mask[:, before:]

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by `function` of it."""
        if self.positions is None:
            return
        self.positions = function(self.positions)
        for layer in self.layers:
            layer.state = tree_map(function, layer.state)

    def detach(self) -> None:
        """Cut off the graph of the tokens before, for training on the segments of a document."""
        self.map(Tensor.detach)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.map(lambda t: t.repeat_interleave(repeats, dim=0))

    def reset(self) -> None:
        """Begin another document."""
        self.positions = None
        self.tokens.zero_()
        for layer in self.layers:
            layer.state = None

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError(f"tokens_to_remove is {tokens_to_remove}, expected 0: states cannot forget tokens")

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("cache is a SpadeCache, expected another one: only SPADE models read and write its states")

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens there were in each row, padding included."""
        return int(self.tokens)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return int(self.tokens) + query_length, 0

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = [self.positions, *(layer.state for layer in self.layers)]
        return sum(t.nbytes for t in tree_leaves(tensors) if isinstance(t, torch.Tensor))


def states_of(cache: Cache | None) -> Cache | None:
    """What a cache keeps of a model's own tokens, without the keys and values of its encoder."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
