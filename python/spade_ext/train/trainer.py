"""The Hugging Face Trainer with the optimizer groups that our modules ask for, and with runs that can be killed."""

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, Sampler
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler, get_parameter_names
from transformers.trainer_utils import EvalLoopOutput, SaveStrategy

from .checkpoint import STAGING, find_damage, prune, publish, saving
from .recipe import RECIPE_FILE, Recipe

logger = logging.getLogger(__name__)


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


class SeededLengthGroupedSampler(LengthGroupedSampler):
    """`LengthGroupedSampler` with an order that follows from seed and epoch, not from what was drawn before."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()


class SaveLast(TrainerCallback):
    """A checkpoint is the last that happens at its step, since a run that is resumed does not come back to it.

    So the losses since the last log are logged before, and a checkpoint of an epoch's last step waits for what the
    epoch's end brings.
    """

    waits = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if control.should_save or (control.should_evaluate and args.save_strategy == SaveStrategy.BEST):
            control.should_log = True
        ends_epoch = control.should_training_stop or state.epoch == int(state.epoch)
        self.waits = control.should_save and ends_epoch
        if self.waits:
            control.should_save = False

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self.waits or control.should_save:
            control.should_log = control.should_save = True
        self.waits = False


class SpadeTrainer(Trainer):
    """`transformers.Trainer` whose optimizer gives each parameter the options that its module asks for.

    Its checkpoints are whole or absent, see `spade_ext.train.checkpoint`, and hold `recipe`, if given, as recipe.yaml.
    A run that is resumed from one ends with the weights and the log of a run that was never interrupted, bit for bit
    on the same machine with the same number of threads.
    """

    def __init__(self, *args, recipe: Recipe | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.recipe = recipe
        self.add_callback(SaveLast())

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(parameter_groups(model, self.args.weight_decay), **options)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            batch_size = sampler.batch_size * self.args.world_size  # that of all processes, which share the order
            sampler = SeededLengthGroupedSampler(batch_size, sampler.lengths, seed)
        return sampler

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """The Trainer's, but the loss is the mean over the rows.

        Its own counts the last batch as a full one, and with several processes the rows that fill it up.
        """
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if output.predictions is None:
            raise ValueError(
                "training.prediction_loss_only or batch_eval_metrics is True, expected False for accuracies"
            )
        logits, labels = map(torch.from_numpy, (output.predictions, output.label_ids))
        loss = self.model.loss_function(labels=labels, pooled_logits=logits, config=self.model.config)
        output.metrics[f"{metric_key_prefix}_loss"] = loss.item()
        return output

    def _get_output_dir(self, trial: Any) -> str:
        """Where the Trainer writes, and deletes, checkpoints."""
        return os.path.join(super()._get_output_dir(trial), STAGING)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step = self.state.global_step
        staged = Path(self._get_output_dir(trial)) / f"checkpoint-{step}"
        run = staged.parent.parent
        best = self._best_checkpoint(run)
        with saving(staged, f"the checkpoint of step {step}"):
            if self.args.should_save:
                shutil.rmtree(staged, ignore_errors=True)  # a save of this step that was interrupted
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            if best and (self.state.best_global_step == step or best.is_dir()):
                self.state.best_model_checkpoint = str(best)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(staged / TRAINER_STATE_NAME)  # the best checkpoint's name is not a staged one
                if self.recipe:
                    self.recipe.save(staged / RECIPE_FILE)
                publish(staged)
        if self.args.should_save:
            prune(run, self.args.save_total_limit, best)

    def _best_checkpoint(self, run: Path) -> Path | None:
        step = self.state.best_global_step
        return run / f"checkpoint-{step}" if step else None

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, num_epochs: int, checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        position = super()._init_training_state(max_steps, steps_per_epoch, num_epochs, checkpoint, trial)
        self.state.compute_steps(self.args, max_steps)  # a checkpoint brings those of its own recipe
        if checkpoint and (best := self._best_checkpoint(Path(checkpoint).parent)):
            damage = find_damage(best)
            self.state.best_model_checkpoint = None if damage else str(best)
            if damage and self.args.load_best_model_at_end:
                if self.is_world_process_zero():
                    logger.warning(
                        "%s, the best so far, is not whole: %s; the best after it takes its place", best, damage
                    )
                self.state.best_metric = self.state.best_global_step = None
        return position

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:  # after a checkpoint of the last step none is left
            super()._run_epoch(*args, **kwargs)
