"""SPADE as Hugging Face models, and `attn_implementation="spade_local"` for other models.

Importing this registers them with the Auto classes and the attention with `AttentionInterface`.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from . import attention_interface, published  # noqa: F401  (register the attention and the published names)
from .cache import SpadeCache
from .configuration_encoder_decoder import SpadeEncoderDecoderConfig
from .configuration_spade import SpadeConfig
from .encoder_decoder import (
    SpadeEncoderDecoderModel,
    SpadeEncoderModel,
    SpadeForConditionalGeneration,
    SpadeForSeq2SeqClassification,
)
from .mixers import register_mixer
from .modeling_spade import (
    SpadeForCausalLM,
    SpadeForMaskedLM,
    SpadeForSequenceClassification,
    SpadeModel,
    SpadePreTrainedModel,
)

AutoConfig.register(SpadeConfig.model_type, SpadeConfig, exist_ok=True)
AutoModel.register(SpadeConfig, SpadeModel, exist_ok=True)
AutoModelForCausalLM.register(SpadeConfig, SpadeForCausalLM, exist_ok=True)
AutoModelForMaskedLM.register(SpadeConfig, SpadeForMaskedLM, exist_ok=True)
AutoModelForSequenceClassification.register(SpadeConfig, SpadeForSequenceClassification, exist_ok=True)

AutoConfig.register(SpadeEncoderDecoderConfig.model_type, SpadeEncoderDecoderConfig, exist_ok=True)
AutoModel.register(SpadeEncoderDecoderConfig, SpadeEncoderDecoderModel, exist_ok=True)
AutoModelForSeq2SeqLM.register(SpadeEncoderDecoderConfig, SpadeForConditionalGeneration, exist_ok=True)
AutoModelForSequenceClassification.register(SpadeEncoderDecoderConfig, SpadeForSeq2SeqClassification, exist_ok=True)

__all__ = [
    "SpadeCache",
    "SpadeConfig",
    "SpadeEncoderDecoderConfig",
    "SpadeEncoderDecoderModel",
    "SpadeEncoderModel",
    "SpadeForCausalLM",
    "SpadeForConditionalGeneration",
    "SpadeForMaskedLM",
    "SpadeForSeq2SeqClassification",
    "SpadeForSequenceClassification",
    "SpadeModel",
    "SpadePreTrainedModel",
    "register_mixer",
]
