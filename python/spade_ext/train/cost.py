"""What a training step costs: floating-point operations of products, and memory of what the backward needs.

Operations are those that torch's FlopCounterMode counts, our ops by the formulas of spade_ext/ops/flops.py. Elementwise
work (activations, norms, softmax's exponentials) is not counted, nor are the temporaries of an op.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from ..models import SpadeForSequenceClassification
from .recipe import Recipe

KINDS = ("linear", "attention", "ssm")


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
    with FlopCounterMode(display=False) as forward, saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**inputs).loss
    with FlopCounterMode(display=False) as backward:
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
