"""The Hugging Face Trainer with the optimizer groups that our modules ask for."""

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import EvalPrediction, Trainer
from transformers.trainer_pt_utils import get_parameter_names


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups: parameters with the same options together.

    A module's `parameter_options() -> {name: {"lr": ..., "weight_decay": ...}}` says which of its own parameters
    differ; LayerNorm weights and biases are not decayed. Of a shared parameter, the first module decides.
    """
    decayed = set(get_parameter_names(model, [nn.LayerNorm], [r"bias$"]))
    seen: set[nn.Parameter] = set()
    groups: dict[tuple, dict[str, Any]] = {}
    for module_name, module in model.named_modules():
        own_options = module.parameter_options() if hasattr(module, "parameter_options") else {}
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            full_name = f"{module_name}.{name}" if module_name else name
            options = {"weight_decay": weight_decay if full_name in decayed else 0.0, **own_options.get(name, {})}
            groups.setdefault(tuple(sorted(options.items())), {"params": [], **options})["params"].append(parameter)
    return list(groups.values())


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of rows, 0 to 1, whose largest logit is the label's."""
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


class SpadeTrainer(Trainer):
    """`transformers.Trainer` whose optimizer gives each parameter the options that its module asks for."""

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(parameter_groups(model, self.args.weight_decay), **options)
        return self.optimizer
