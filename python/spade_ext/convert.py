"""State dicts of the published code, under our names."""

from collections.abc import Mapping
from functools import singledispatch

import torch
from torch import Tensor, nn

from .nn import EMA, S4, GatedAttention, LocalAttention, RelativePositionBias
from .nn.dplr import truncate
from .nn.norm import ScaleNorm
from .nn.position import RotaryBias, SimpleBias


def from_reference(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a module whose published counterpart has the state dict `tensors`.

    Entries are views of the given tensors or simple functions of them, so that gradients pass, and gradients
    themselves can be converted alike.

    Args:
        module: an EMA, a GatedAttention, a LocalAttention, an S4 or a SpadeModel, whose embeddings are left alone.
        tensors: under the names of facebookresearch/mega (`MultiHeadEMA`, `MovingAverageGatedAttention`), of
            microsoft/EfficientLongSequenceModeling (local attention, S4, a stack of decoder layers) or of
            state-spaces/s4 (`FFTConv`). The C of an S4 of length 0 is not truncated yet: it is, at module's l_max.

    Raises:
        TypeError: a module without a published counterpart.
        ValueError: names that are missing or left over.
    """
    published = Published(tensors)
    converted = convert_module(module, published)
    if left_over := sorted(set(tensors) - published.taken):
        raise ValueError(
            f"from_reference: tensors has {', '.join(left_over)}, expected only the names of a published "
            f"{type(module).__name__}: {', '.join(sorted(published.taken))}"
        )
    return converted


def load_reference(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load the published state dict `tensors` into module; see `from_reference`."""
    module.load_state_dict(from_reference(module, tensors))


class Published:
    """Published tensors, all or those below a prefix, that remember which of them were taken."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str = "", taken: set[str] | None = None):
        self.tensors, self.prefix = tensors, prefix
        self.taken = set() if taken is None else taken

    def below(self, prefix: str) -> "Published":
        return Published(self.tensors, self.prefix + prefix, self.taken)

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.tensors

    def __getitem__(self, name: str) -> Tensor:
        name = self.prefix + name
        if name not in self.tensors:
            raise ValueError(f"from_reference: tensors lacks {name}, expected among {', '.join(sorted(self.tensors))}")
        self.taken.add(name)
        return self.tensors[name]

    def take(self, *names: str) -> dict[str, Tensor]:
        """Tensors whose published names are ours."""
        return {name: self[name] for name in names}


def prefixed(prefix: str, converted: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in converted.items()}


@singledispatch
def convert_module(module: nn.Module, published: Published) -> dict[str, Tensor]:
    raise TypeError(
        f"from_reference: module is a {type(module).__name__}, expected an EMA, a GatedAttention, a LocalAttention, "
        "an S4 or a SpadeModel"
    )


@convert_module.register
def _(module: EMA, published: Published) -> dict[str, Tensor]:
    columns = published.take("delta", "alpha", "beta")  # (K D, N, 1)
    return {name: t.squeeze(-1) for name, t in columns.items()} | published.take("gamma", "omega")


@convert_module.register
def _(module: GatedAttention, published: Published) -> dict[str, Tensor]:
    linears = [f"{name}.{kind}" for name in ("v_proj", "mx_proj", "h_proj") for kind in ("weight", "bias")]
    return (
        published.take("gamma", "beta", *linears)
        | prefixed("ema.", convert_module(module.ema, published.below("move.")))
        | prefixed("norm.", convert_module(module.norm, published.below("norm.norm.")))
        | prefixed("position.", convert_module(module.position, published.below("rel_pos_bias.")))
    )


@convert_module.register
def _(module: S4, published: Published) -> dict[str, Tensor]:
    state_spaces = "kernel.C" in published
    kernel = published.below("kernel." if state_spaces else "kernel.kernel.")
    dplr = module.kernel == "s4"
    if state_spaces:
        converted = {
            "log_w_real": kernel["A_real"],
            "w_imag": -kernel["A_imag"],
            "log_dt": kernel["inv_dt"].squeeze(-1),
        }
    elif dplr:
        converted = {"log_w_real": kernel["inv_w_real"], **kernel.take("w_imag", "log_dt")}
    else:
        converted = {"log_w_real": kernel["inv_A_real"], "w_imag": kernel["A_imag"], "log_dt": kernel["log_dt"]}
        if "A" in kernel:
            kernel.take("A")  # what the two above make up
    converted |= {"B": kernel["B"].flatten(0, -3), "C": kernel["C"], "D": published["D"]}
    if not dplr:
        return converted
    converted["P"] = kernel["P"]
    length = "l_kernel" if state_spaces else "L"
    return _truncated(module, converted | {"l_max": kernel[length]}) if length in kernel else converted


def _truncated(module: S4, state: dict[str, Tensor]) -> dict[str, Tensor]:
    if state["l_max"] > 0:
        return state
    w = torch.stack((-state["log_w_real"].exp(), state["w_imag"]), dim=-1)
    C = truncate(state["C"], w, state["P"], state["log_dt"], module.nodes)
    return state | {"C": C, "l_max": torch.full_like(state["l_max"], module.nodes)}


@convert_module.register
def _(module: LocalAttention, published: Published) -> dict[str, Tensor]:
    qkv = torch.cat([published[f"{name}.weight"] for name in "qkv"])
    linears = {"qkv.weight": qkv, **published.take("o.weight")}
    if module.position is None:
        return linears
    return linears | prefixed("position.", convert_module(module.position, published.below("relative_attention_bias.")))


@convert_module.register
def _(module: RelativePositionBias, published: Published) -> dict[str, Tensor]:
    return published.take("weight")


@convert_module.register
def _(module: SimpleBias, published: Published) -> dict[str, Tensor]:
    return {"weight": published["rel_pos_bias"][None]}  # of one head


@convert_module.register
def _(module: RotaryBias, published: Published) -> dict[str, Tensor]:
    if "_float_tensor" in published:
        published.take("_float_tensor")  # marks a dtype there, and means nothing
    return published.take("alpha", "beta")


@convert_module.register(nn.LayerNorm)
def _(module: nn.LayerNorm, published: Published) -> dict[str, Tensor]:
    return published.take("weight", "bias")


@convert_module.register(nn.RMSNorm)
def _(module: nn.RMSNorm, published: Published) -> dict[str, Tensor]:
    return published.take("weight")


@convert_module.register
def _(module: ScaleNorm, published: Published) -> dict[str, Tensor]:
    return {"weight": published["scalar"]}
