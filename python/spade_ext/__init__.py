"""SPADE, the state space augmented transformer: C++ ops and modules for PyTorch (arXiv 2212.08136)."""

import torch

try:
    from ._build import TORCH_VERSION as _BUILT_WITH
except ImportError:
    raise ImportError("spade_ext is not built: run `pip install .` in its checkout") from None

_FOUND = torch.__version__.split("+")[0]
if _FOUND != _BUILT_WITH:
    raise ImportError(
        f"spade_ext was built with torch {_BUILT_WITH}, but torch {_FOUND} is installed: run "
        f"`pip install torch=={_BUILT_WITH}`, or `pip install --no-build-isolation .` in the checkout of spade_ext"
    )

from . import nn, ops  # noqa: E402
from ._C import build_info  # noqa: E402
from .memory import keep_memory  # noqa: E402

__version__ = build_info()["version"]
__all__ = ["build_info", "keep_memory", "nn", "ops"]
