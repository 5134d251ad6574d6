"""Modules over the operators, batch first: (B, L, D) in and out, `attention_mask` True or 1 at real tokens."""

from .ema import EMA
from .gated_attention import GatedAttention
from .linear import Linear
from .local_attention import LocalAttention
from .position import AlibiBias, RelativePositionBias, RotaryBias, SimpleBias
from .s4 import S4
from .state_space import reuse_kernels

__all__ = [
    "EMA",
    "S4",
    "AlibiBias",
    "GatedAttention",
    "Linear",
    "LocalAttention",
    "RelativePositionBias",
    "RotaryBias",
    "SimpleBias",
    "reuse_kernels",
]
