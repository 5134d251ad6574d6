"""Modules over the operators, batch first: (B, L, D) in and out, `attention_mask` True or 1 at real tokens."""

from .local_attention import LocalAttention
from .position import RelativePositionBias
from .s4 import S4

__all__ = ["S4", "LocalAttention", "RelativePositionBias"]
