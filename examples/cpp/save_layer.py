"""`python save_layer.py FILE`: saves a SPADE layer, an input and what the layer makes of it, for spade_layer.cpp."""

import sys

import torch

from spade_ext.models import SpadeConfig
from spade_ext.models.modeling_spade import SpadeLayer

torch.manual_seed(0)
config = SpadeConfig(
    hidden_size=16,
    num_attention_heads=2,
    intermediate_size=32,
    hidden_act="relu",
    causal=True,
    window=(8, 0),
    position="simple",
    ssm_d_state=16,
    ssm_l_max=64,
)
layer = SpadeLayer(config, 0).eval()
x = torch.randn(2, 100, 16)  # (B, L, D)
# A plain dict: what C++ reads knows no OrderedDict.
torch.save(dict(layer.state_dict()) | {"x": x, "y": layer(x).detach()}, sys.argv[1])
