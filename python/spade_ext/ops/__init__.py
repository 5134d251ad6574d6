"""The operators: thin functions over `torch.ops.spade_ext`, each with its plain PyTorch reference `<op>_ref`."""

from . import flops  # noqa: F401
from .diagonal import (
    diagonal_kernel,
    diagonal_kernel_ref,
    diagonal_scan,
    diagonal_scan_ref,
    diagonal_step,
    diagonal_step_ref,
)
from .linear_step import linear_step, linear_step_ref
from .local_attention import (
    local_attention,
    local_attention_ref,
    local_attention_step,
    local_attention_step_ref,
)
from .long_conv import long_conv, long_conv_ref
from .s4 import s4_kernel, s4_kernel_ref, s4_state, s4_state_ref, s4_step, s4_step_ref

__all__ = [
    "diagonal_kernel",
    "diagonal_kernel_ref",
    "diagonal_scan",
    "diagonal_scan_ref",
    "diagonal_step",
    "diagonal_step_ref",
    "linear_step",
    "linear_step_ref",
    "local_attention",
    "local_attention_ref",
    "local_attention_step",
    "local_attention_step_ref",
    "long_conv",
    "long_conv_ref",
    "s4_kernel",
    "s4_kernel_ref",
    "s4_state",
    "s4_state_ref",
    "s4_step",
    "s4_step_ref",
]
