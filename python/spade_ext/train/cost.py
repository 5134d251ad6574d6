"""What a training step costs: floating-point operations of products, and memory of what the backward needs.

Products of matrices are counted by torch, our ops by the formulas below, whose sources are the sections "Cost" of
spade_ext/*/README.md. A multiplication and an addition are two operations. Elementwise work (activations, norms,
softmax's exponentials) is not counted, nor are the temporaries of an op.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from ..models import SpadeForSequenceClassification
from .recipe import Recipe

KINDS = ("linear", "attention", "ssm")

Shape = Sequence[int]


def attended_pairs(queries: int, keys: int, left: int, right: int, chunk_size: int | None = None) -> int:
    """Pairs of a query and a key in its window, and in its chunk; the last query stands at the last key."""
    chunk = chunk_size or keys
    pairs = 0
    for position in range(keys - queries, keys):
        start = position // chunk * chunk
        first, last = max(0, start, position - left), min(keys, start + chunk, position + right + 1)
        pairs += max(0, last - first)
    return pairs


def fft_length(least: int) -> int:
    """The smallest 2^a, 3 * 2^a or 5 * 2^a, a of 1 or more, that is at least `least`."""
    return min(factor << max(1, math.ceil(math.log2(least / factor))) for factor in (1, 3, 5))


# The arguments of a formula are those of its op, tensors as shapes.


def _attention(
    q: Shape, k: Shape, v: Shape, left: int, right: int, chunk_size: int | None = None, **rest: Any
) -> tuple[int, int, int]:
    B, Lq, H, D = q
    return B * H * attended_pairs(Lq, k[1], left, right, chunk_size), D, v[-1]


def local_attention_forward(**shapes: Any) -> int:
    pairs, D, Dv = _attention(**shapes)
    return (2 * D + 2 * Dv) * pairs


def local_attention_backward(**shapes: Any) -> int:
    """What is needed; the op forms the scores once more than that."""
    pairs, D, Dv = _attention(**shapes)
    return (6 * D + 4 * Dv) * pairs


def _convolution(u: Shape, k: Shape, k_reverse: Shape | None = None, **rest: Any) -> tuple[int, int, int, int, float]:
    B, H, L = u
    C = k[0] if len(k) == 3 else 1
    reach = max(min(k[-1], L) - 1, min(k_reverse[-1], L - 1) if k_reverse else 0)
    n = fft_length(L + reach)
    return B, C, H, n, 2.5 * n * math.log2(n)


def long_conv(**shapes: Any) -> float:
    B, C, H, n, transform = _convolution(**shapes)
    return H * ((B + C + B * C) * transform + 3 * n * B * C)


def long_conv_backward(**shapes: Any) -> float:
    B, C, H, n, transform = _convolution(**shapes)
    return H * ((2 * B + 2 * C + B * C) * transform + 6 * n * B * C)


def diagonal_kernel(c: Shape, length: int, **rest: Any) -> int:
    C, H, N, *pair = c
    return (4 if pair else 2) * C * H * N * length


def diagonal_kernel_backward(grad_k: Shape, c: Shape, **rest: Any) -> int:
    C, H, N, *pair = c
    return (8 if pair else 4) * C * H * N * grad_k[-1]


def _diagonal_scan(u: Shape, c: Shape, **rest: Any) -> tuple[int, int, int]:
    """Tokens of all systems, real numbers of a state, C."""
    C, H, N, *pair = c
    return u[0] * u[-1] * H, 2 * N if pair else N, C


def diagonal_scan(**shapes: Any) -> int:
    tokens, N, C = _diagonal_scan(**shapes)
    return tokens * ((2 + 2 * C) * N + 18 * C)


def diagonal_scan_backward(**shapes: Any) -> int:
    tokens, N, C = _diagonal_scan(**shapes)
    return tokens * ((8 + 4 * C) * N + 38 * C)


def _s4_kernel(p: Shape, b: Shape, c: Shape, length: int, nodes: int, rate: float) -> tuple[float, int]:
    """H N times the nodes that are evaluated, half of n by symmetry; the number of Cauchy sums at each."""
    R, M, (C, H, N, _) = p[0], b[0], c
    n = max(round(nodes / rate), 1)
    return H * N / 2 * (n + 1.5 * max(length - n, 0)), (C + R) * (M + R)


def s4_kernel(p: Shape, b: Shape, c: Shape, length: int, nodes: int, rate: float = 1.0, **rest: Any) -> float:
    evaluated, sums = _s4_kernel(p, b, c, length, nodes, rate)
    return evaluated * (14 + 8 * sums)


def s4_kernel_backward(grad_k: Shape, p: Shape, b: Shape, c: Shape, nodes: int, rate: float, **rest: Any) -> float:
    evaluated, sums = _s4_kernel(p, b, c, grad_k[-1], nodes, rate)
    return evaluated * (36 + 24 * sums)


FORMULAS: dict[str, Callable[..., float]] = {
    function.__name__: function
    for function in (
        local_attention_forward,
        local_attention_backward,
        long_conv,
        long_conv_backward,
        diagonal_kernel,
        diagonal_kernel_backward,
        diagonal_scan,
        diagonal_scan_backward,
        s4_kernel,
        s4_kernel_backward,
    )
}


def _count_by_name(name: str) -> Callable[..., float]:
    """The formula of one of our ops, called with its shapes in the order of the op's arguments."""
    schema = getattr(torch.ops.spade_ext, name).default._schema

    def count(*args: Any, out_shape: Any = None, **kwargs: Any) -> float:
        if name not in FORMULAS:
            raise ValueError(f"the model uses spade_ext.{name}, of which spade_ext.train.cost has no formula")
        names = [argument.name for argument in schema.arguments]
        return FORMULAS[name](**dict(zip(names, args, strict=False)), **kwargs)

    return count


def _flop_counter() -> FlopCounterMode:
    names = {
        name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "spade_ext::" in name
    }
    ours = {getattr(torch.ops.spade_ext, name): _count_by_name(name) for name in names}
    return FlopCounterMode(display=False, custom_mapping=ours)


def _by_kind(counter: FlopCounterMode) -> dict[str, float]:
    flops = dict.fromkeys(KINDS, 0.0)
    for op, number in counter.get_flop_counts().get("Global", {}).items():
        name = str(op)
        ours = name.startswith("spade_ext.")
        flops["linear" if not ours else "attention" if "attention" in name else "ssm"] += number
    return flops


@dataclass(frozen=True)
class StepCost:
    """Of one step of training.

    Attributes:
        forward, backward: operations by kind: products of matrices, attention over windows, state space models.
        activations: bytes that the forward keeps for the backward, without parameters.
    """

    forward: dict[str, float]
    backward: dict[str, float]
    activations: int


def step_cost(model: nn.Module, inputs: dict[str, Tensor]) -> StepCost:
    """The cost of a step of a model that returns a loss; on the device "meta" it takes no time and no memory."""
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    model.train()
    with _flop_counter() as forward, saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**inputs).loss
    with _flop_counter() as backward:
        loss.backward()
    return StepCost(_by_kind(forward), _by_kind(backward), sum(storage.nbytes() for storage in kept.values()))


def training_memory(model: nn.Module) -> int:
    """Bytes of parameters and buffers and, for those that are trained, of gradients and the two moments of AdamW."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.nbytes * (4 if tensor.requires_grad else 1) for tensor in tensors)


def recipe_costs(recipe: Recipe, lengths: Iterable[int]) -> tuple[PreTrainedModel, dict[int, StepCost]]:
    """A recipe's model, without memory, and what a step with its batch costs for sequences of each length."""
    with torch.device("meta"):
        model = SpadeForSequenceClassification(recipe.model_config())
    batch = recipe.training_arguments().per_device_train_batch_size
    task = recipe.make_task()
    collate = task.collator()
    costs = {}
    for length in lengths:
        inputs = {name: tensor.to("meta") for name, tensor in collate([task.blank(length)] * batch).items()}
        costs[length] = step_cost(model, inputs)
    return model, costs
