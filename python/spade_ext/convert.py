"""State dicts of the published code under our names, and ours under theirs.

`rules` lists, module by module, which published tensors hold which of ours; both directions follow from that list.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from .nn import EMA, S4, GatedAttention, LocalAttention, RelativePositionBias
from .nn.dplr import truncate
from .nn.norm import ScaleNorm
from .nn.position import RotaryBias, SimpleBias


class Form(NamedTuple):
    """How published tensors hold one of ours. Its two functions undo each other, bit for bit."""

    ours: Callable[..., Tensor]
    published: Callable[[Tensor], Sequence[Tensor]]


SAME = Form(lambda t: t, lambda t: [t])
NEGATED = Form(lambda t: -t, lambda t: [-t])
AS_COLUMN = Form(lambda t: t.squeeze(-1), lambda t: [t.unsqueeze(-1)])  # ours (..., N), theirs (..., N, 1)
AS_ROW = Form(lambda t: t.squeeze(0), lambda t: [t.unsqueeze(0)])  # ours (..., N), theirs (1, ..., N)
FROM_COLUMN = Form(lambda t: t.unsqueeze(-1), lambda t: [t.squeeze(-1)])
FROM_ROW = Form(lambda t: t.unsqueeze(0), lambda t: [t.squeeze(0)])
IN_THIRDS = Form(lambda *thirds: torch.cat(thirds), lambda t: t.chunk(3))
LEFT_ALONE = Form(lambda: None, lambda t: [])


@dataclass(frozen=True)
class Rule:
    """The published tensors that hold one of ours.

    Attributes:
        ours: our tensor's name.
        published: theirs; none where ours stays what it is in the module.
        form: how they hold it.
        optional: a file may lack them, and ours is then left out.
        neutral: a file may lack them, and ours is then filled with this number; nor are they written where it is.
    """

    ours: str
    published: tuple[str, ...]
    form: Form = SAME
    optional: bool = False
    neutral: float | None = None


@dataclass(frozen=True)
class Derived:
    """A published buffer that says nothing of its own: written as made of tensors of ours, and not read."""

    published: tuple[str]
    ours: tuple[str, ...] = ()
    make: Callable[..., Tensor] = lambda: torch.zeros(1)


Rules = list[Rule | Derived]


def rule(ours: str, published: str, form: Form = SAME, **options) -> Rule:
    return Rule(ours, (published,), form, **options)


def same(*names: str) -> Rules:
    """Tensors whose published names are ours."""
    return [rule(name, name) for name in names]


def linears(*names: str) -> Rules:
    return same(*(f"{name}.{kind}" for name in names for kind in ("weight", "bias")))


def below(ours: str, published: str, inner: Iterable[Rule | Derived]) -> Rules:
    """The rules of a module that has the prefix `ours` with us and `published` with them."""

    def prefixed(r: Rule | Derived) -> Rule | Derived:
        names = ours + r.ours if isinstance(r, Rule) else tuple(ours + name for name in r.ours)
        return replace(r, ours=names, published=tuple(published + name for name in r.published))

    return [prefixed(r) for r in inner]


@singledispatch
def rules(module: nn.Module) -> Rules:
    """Which published tensors hold which of a module's; other modules' are registered."""
    raise TypeError(
        f"module is a {type(module).__name__}, expected an EMA, a GatedAttention, a LocalAttention, an S4, a "
        "SpadeModel or a SpadeForCausalLM"
    )


@rules.register
def _(module: EMA) -> Rules:
    return [*(rule(name, name, AS_COLUMN) for name in ("delta", "alpha", "beta")), *same("gamma", "omega")]


@rules.register
def _(module: GatedAttention) -> Rules:
    return [
        *same("gamma", "beta"),
        *linears("v_proj", "mx_proj", "h_proj"),
        *below("ema.", "move.", rules(module.ema)),
        *below("norm.", "norm.norm.", rules(module.norm)),
        *below("position.", "rel_pos_bias.", rules(module.position)),
    ]


@rules.register
def _(module: S4) -> Rules:
    if module.kernel == "s4":
        state_matrix = [rule("log_w_real", "inv_w_real"), *same("w_imag", "P"), rule("B", "B", AS_ROW)]
        kernel = [*state_matrix, rule("l_max", "L", optional=True)]
    else:
        kernel = [rule("log_w_real", "inv_A_real"), rule("w_imag", "A_imag"), *same("B")]
        kernel.append(Derived(("A",), ("log_w_real", "w_imag"), diagonal))
    return [*same("D"), *below("", "kernel.kernel.", [*kernel, *same("C", "log_dt")])]


def state_spaces_rules(module: S4) -> Rules:
    """Those of state-spaces/s4, where `rules` has SPADE's."""
    kernel = [
        rule("log_w_real", "A_real"),
        rule("w_imag", "A_imag", NEGATED),
        rule("log_dt", "inv_dt", AS_COLUMN),
        rule("B", "B", AS_ROW),
        *same("C"),
    ]
    if module.kernel == "s4":
        kernel += [*same("P"), rule("l_max", "l_kernel", optional=True)]
    return [*same("D"), *below("", "kernel.", kernel)]


@rules.register
def _(module: LocalAttention) -> Rules:
    position = [] if module.position is None else rules(module.position)
    return [
        Rule("qkv.weight", ("q.weight", "k.weight", "v.weight"), IN_THIRDS),
        *same("o.weight"),
        *below("position.", "relative_attention_bias.", position),
    ]


@rules.register
def _(module: RelativePositionBias) -> Rules:
    return same("weight")


@rules.register
def _(module: SimpleBias) -> Rules:
    return [rule("weight", "rel_pos_bias", FROM_ROW)]  # of one head


@rules.register
def _(module: RotaryBias) -> Rules:
    return [*same("alpha", "beta"), Derived(("_float_tensor",))]  # which marks a dtype


@rules.register(nn.Identity)
def _(module: nn.Identity) -> Rules:
    return []


@rules.register(nn.LayerNorm)
def _(module: nn.LayerNorm) -> Rules:
    return same("weight", "bias")


@rules.register(nn.RMSNorm)
def _(module: nn.RMSNorm) -> Rules:
    return same("weight")


@rules.register
def _(module: ScaleNorm) -> Rules:
    return [rule("weight", "scalar")]


def from_reference(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a module whose published counterpart has the state dict `tensors`.

    Entries are views of the given tensors or simple functions of them, so that gradients pass, and gradients
    themselves can be converted alike.

    Args:
        module: an EMA, a GatedAttention, a LocalAttention, an S4, a SpadeForCausalLM or a SpadeModel: of SPADE's
            decoder its layers, the embeddings being left alone, or MEGA's encoder.
        tensors: under the names of facebookresearch/mega (`MultiHeadEMA`, `MovingAverageGatedAttention`, `mega_lm`,
            `MegaLRAEncoder`), of microsoft/EfficientLongSequenceModeling (local attention, S4, a stack of decoder
            layers, `spade_lm`) or of state-spaces/s4 (`FFTConv` with dt_transform="exp"). The C of an S4 of length 0 is
            not truncated yet: it is, at module's l_max.

    Raises:
        TypeError: a module without a published counterpart.
        ValueError: names that are missing or left over; tensors that differ where ours is one.
    """
    with _errors_of("from_reference"):
        found = _rules_for(module, tensors)
        _check_names(module, tensors, found)
        own, converted = module.state_dict(), {}
        for r in _held(found):
            if not r.published:
                converted[r.ours] = own[r.ours]
            elif r.published[0] in tensors:
                value = r.form.ours(*(tensors[name] for name in r.published))
                if r.ours in converted and not torch.equal(converted[r.ours], value):
                    raise ValueError(f"{r.published[0]} is not tied to the embedding, expected the same numbers")
                converted[r.ours] = value
            elif r.neutral is not None:
                converted[r.ours] = torch.full_like(own[r.ours], r.neutral)
        return converted | _truncations(module, converted)


def load_reference(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load the published state dict `tensors` into module; see `from_reference`.

    Raises:
        ValueError: also a shape that is not module's, and an S4 without its length.
    """
    with _errors_of("load_reference"):
        _check_shapes(module, tensors)
    converted = from_reference(module, tensors)
    for r in _held(_rules_for(module, tensors)):
        if r.ours not in converted:
            expected = f"expected among {_listed(sorted(tensors))}"
            raise ValueError(f"load_reference: tensors lacks {r.published[0]}, {expected}")
    module.load_state_dict(converted)


def to_reference(module: nn.Module, *, source: Literal["spade", "state-spaces"] = "spade") -> dict[str, Tensor]:
    """The published state dict that `from_reference` takes to module's: its inverse, bit for bit.

    Buffers that hold nothing of their own are made anew: `_float_tensor`, and the `A` of a diagonal S4.

    Args:
        module: see `from_reference`.
        source: whose names an S4 is given, those of microsoft/EfficientLongSequenceModeling or of state-spaces/s4.

    Returns:
        Tensors that share memory with the module's, and where they are tied with each other.

    Raises:
        TypeError: a module without a published counterpart.
        ValueError: a tensor without one, or source "state-spaces" of a module other than an S4.
    """
    with _errors_of("to_reference"):
        known = ("spade", "state-spaces") if isinstance(module, S4) else ("spade",)
        if source not in known:
            raise ValueError(f"source is {source!r}, expected {' or '.join(map(repr, known))}")
        found = state_spaces_rules(module) if source == "state-spaces" else rules(module)
        own, tensors = module.state_dict(), {}
        held = {r.ours for r in _held(found)}
        if others := [name for name in own if name not in held]:
            raise ValueError(f"module has {_listed(others)}, expected only tensors that the published code has too")
        for r in found:
            if isinstance(r, Derived):
                tensors[r.published[0]] = r.make(*(own[name] for name in r.ours))
            elif r.neutral is None or not bool((own[r.ours] == r.neutral).all()):
                tensors |= zip(r.published, r.form.published(own[r.ours]), strict=True)
        return tensors


@contextmanager
def _errors_of(function: str) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{function}: {error}") from None


def _rules_for(module: nn.Module, tensors: Mapping[str, Tensor]) -> Rules:
    return state_spaces_rules(module) if isinstance(module, S4) and "kernel.C" in tensors else rules(module)


def _held(found: Rules) -> list[Rule]:
    return [r for r in found if isinstance(r, Rule)]


def _check_names(module: nn.Module, tensors: Mapping[str, Tensor], found: Rules) -> None:
    needed = [name for r in _held(found) if not r.optional and r.neutral is None for name in r.published]
    if missing := [name for name in needed if name not in tensors]:
        raise ValueError(f"tensors lacks {missing[0]}, expected among {_listed(sorted(tensors))}")
    known = {name for r in found for name in r.published}
    if left_over := sorted(set(tensors) - known):
        raise ValueError(
            f"tensors has {_listed(left_over)}, expected only the names of a published {type(module).__name__}: "
            f"{_listed(sorted(known))}"
        )


def _check_shapes(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    own = module.state_dict()
    for r in _held(_rules_for(module, tensors)):
        for name, expected in zip(r.published, r.form.published(own[r.ours]), strict=True):
            if name in tensors and tensors[name].shape != expected.shape:
                raise ValueError(f"{name} has shape {list(tensors[name].shape)}, expected {list(expected.shape)}")


def _listed(names: Sequence[str]) -> str:
    """The names, or the first of many."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _truncations(module: nn.Module, converted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """C and l_max of each S4 in module whose C is not truncated yet."""
    truncated = {}
    for path, layer in module.named_modules():
        if not isinstance(layer, S4):
            continue
        prefix = f"{path}." if path else ""
        state = {name.removeprefix(prefix): t for name, t in converted.items() if name.startswith(prefix)}
        if "l_max" in state and state["l_max"] == 0:
            w = diagonal(state["log_w_real"], state["w_imag"])
            truncated[f"{prefix}C"] = truncate(state["C"], w, state["P"], state["log_dt"], layer.nodes)
            truncated[f"{prefix}l_max"] = torch.full_like(state["l_max"], layer.nodes)
    return truncated


def diagonal(log_w_real: Tensor, w_imag: Tensor) -> Tensor:
    """The diagonal of A, (S, N, 2)."""
    return torch.stack((-log_w_real.exp(), w_imag), dim=-1)
