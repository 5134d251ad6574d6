# Copyright 2026 The spade-ext developers.
"""What `generate` needs to know of SPADE models."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationMixin, PreTrainedConfig

from ..nn.state_space import reuse_kernels
from .cache import states_of


class SpadeGenerationMixin(GenerationMixin):
    """Generation from a `SpadeCache`."""

    _is_stateful = True  # states cannot forget the last tokens, as assisted generation would have them do

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, and state space layers compute once what depends on their parameters alone."""
        with reuse_kernels(self, steps=True):
            return super().generate(*args, **kwargs)

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        if not generation_config.use_cache or model_kwargs.get("cache") is not None:
            return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        if (kind := generation_config.cache_implementation) not in (None, "dynamic", "static"):
            raise ValueError(f"cache_implementation is {kind!r}, expected None, 'dynamic' or 'static'")
        model_kwargs["cache"] = self.get_decoder().new_cache()

    @staticmethod
    def create_masks_for_generate(
        config: PreTrainedConfig, inputs_embeds: Tensor, attention_mask: Tensor | None, cache: Cache, **kwargs: Any
    ) -> Tensor | None:
        """The mask of the new tokens, whose shape does not grow; that of the tokens before is in the states."""
        if attention_mask is None:
            return None
        return states_of(cache).mask_of_new_tokens(attention_mask, inputs_embeds.size(1))
