"""Train a recipe's model, and evaluate what a run left."""

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, PreTrainedModel, set_seed

from ..data.files import flush, write_text
from ..models import SpadeForSequenceClassification
from .checkpoint import STAGING, checkpoints, find_damage, newest_whole, saving, set_aside, step_of
from .curves import plot_curves
from .recipe import RECIPE_FILE, Recipe
from .trainer import SpadeTrainer, accuracy

CURVES_FILE = "curves.png"
METRICS_FILE = "training.json"
MODEL_FILE = "model.safetensors"

# What may change from start to start of one run: where it stands; how long it takes and what is reported of it.
_PLACES = ("training.output_dir", "training.resume_from_checkpoint")
_CHANGEABLE = (
    "training.disable_tqdm",
    "training.eval_",
    "training.log",
    "training.max_steps",
    "training.num_train_epochs",
    "training.per_device_eval_batch_size",
    "training.report_to",
    "training.save_",
    "training.use_cpu",
)

logger = logging.getLogger(__name__)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def _make_trainer(**options: Any) -> SpadeTrainer:
    try:
        return SpadeTrainer(compute_metrics=accuracy, **options)
    except (ValueError, ImportError, RuntimeError) as error:  # such as a package of report_to that is not installed
        raise ValueError(f"training: {error}") from error


def _checkpoint_to_resume(recipe: Recipe, given: str | None) -> tuple[Path | None, list[str]]:
    """The checkpoint from which a recipe's run goes on, and what to tell about others."""
    folder = Path(recipe.training["output_dir"])
    if given is None:
        if (folder / METRICS_FILE).exists():
            raise FileExistsError(
                f"training.output_dir is {folder}, which holds a finished run, expected another folder, or a "
                "checkpoint of it as training.resume_from_checkpoint"
            )
        return newest_whole(folder)
    if not Path(given).is_dir():
        raise FileNotFoundError(f"training.resume_from_checkpoint is {given}, expected a checkpoint's folder")
    if Path(given) not in checkpoints(Path(given).parent):
        raise ValueError(f"training.resume_from_checkpoint is {given}, expected a folder named checkpoint-<step>")
    if damage := find_damage(Path(given)):
        raise ValueError(f"training.resume_from_checkpoint is {given}, expected a whole checkpoint, but {damage}")
    return Path(given), []


def _check_resumable(recipe: Recipe, checkpoint: Path, processes: int) -> list[str]:
    """Refuse to go on where the recipe is another one; return the differences that do not matter, as sentences."""
    if not (checkpoint / "scheduler.pt").is_file():
        raise ValueError(f"{checkpoint} holds a model only, expected one saved with training.save_only_model=false")
    if (before := len(list(checkpoint.glob("rng_state*.pth")))) != processes:
        raise ValueError(
            f"{checkpoint} was saved by {before} processes, expected {processes} as now, or another "
            "training.output_dir to start anew"
        )
    changes = []
    for field, change in recipe.differences(Recipe.load(checkpoint / RECIPE_FILE)):
        if field in _PLACES:
            continue
        if not field.startswith(_CHANGEABLE):
            raise ValueError(
                f"{field} is {change} in {checkpoint}, expected the same, or another training.output_dir to start anew"
            )
        changes.append(f"{field} is {change}")
    return changes


def _save_model(trainer: SpadeTrainer, folder: Path) -> None:
    """Save a model so that one which stands in the folder stays until the new one is on the disk."""
    staged = folder / STAGING / "model"
    with saving(staged, "the model"):
        trainer.save_model(str(staged))
        if trainer.args.should_save:
            files = list(staged.iterdir())
            for path in files:
                flush(path)
            for path in files:
                os.replace(path, folder / path.name)
            flush(folder)
            shutil.rmtree(folder / STAGING)


def train(recipe: Recipe) -> dict[str, Any]:
    """Train a recipe's model and write the run to training.output_dir.

    Where the folder holds an interrupted run of the recipe, training goes on from its newest whole checkpoint, or from
    training.resume_from_checkpoint. Of several processes, the first one writes. The folder then holds the model as
    save_pretrained writes it, recipe.yaml, the Trainer's checkpoints, curves.png and, last, training.json.

    Returns:
        The content of training.json. "history" is that of all steps, train_loss and train_runtime are those of the
        steps since the last start.

    Raises:
        FileExistsError: the folder already holds a finished run, and training.resume_from_checkpoint is not set.
        ValueError: the checkpoint is not whole, or of another recipe.
        OSError: a checkpoint could not be saved.
    """
    folder = Path(recipe.training["output_dir"])
    task, arguments = recipe.make_task(), recipe.training_arguments()
    checkpoint, problems = _checkpoint_to_resume(recipe, arguments.resume_from_checkpoint)
    changes = _check_resumable(recipe, checkpoint, arguments.world_size) if checkpoint else []
    set_seed(arguments.seed)
    datasets = {split: task.dataset(split) for split in ("train", "validation")}
    model = SpadeForSequenceClassification(recipe.model_config())
    trainer = _make_trainer(
        model=model,
        args=arguments,
        data_collator=task.collator(),
        train_dataset=datasets["train"],
        eval_dataset=datasets["validation"],
        recipe=recipe,
    )
    trainer.accelerator.wait_for_everyone()  # all have read what the first changes
    writes = trainer.is_world_process_zero()
    if writes:
        for problem in problems:
            logger.warning("%s; it is left aside", problem)
        if checkpoint:
            logger.warning("training goes on from %s", "; ".join([str(checkpoint), *changes]))
        elif (folder / RECIPE_FILE).exists():
            logger.warning("%s holds no whole checkpoint, training starts from the beginning", folder)
        folder.mkdir(parents=True, exist_ok=True)
        set_aside(folder, step_of(checkpoint) if checkpoint else 0)
        (folder / METRICS_FILE).unlink(missing_ok=True)
        recipe.save(folder / RECIPE_FILE)
    arguments.eval_on_start = arguments.eval_on_start and checkpoint is None
    result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    history = list(trainer.state.log_history)  # without the evaluation below
    _save_model(trainer, folder)
    metrics = {
        **result.metrics,
        **trainer.evaluate(),
        "parameters": model.num_parameters(),
        "history": history,
    }
    if writes:
        plot_curves(history, task.baselines(datasets["train"], datasets["validation"]), folder / CURVES_FILE)
        _write_json(folder / METRICS_FILE, metrics)
    return metrics


def _check_run(folder: Path) -> None:
    if not (folder / RECIPE_FILE).is_file():
        raise FileNotFoundError(f"{folder} holds no {RECIPE_FILE}, expected the output_dir of `spade-ext train`")
    if not (folder / MODEL_FILE).is_file():
        raise FileNotFoundError(f"{folder} holds no finished run: {MODEL_FILE} is missing, expected a trained model")


def _check_evaluation_overrides(overrides: Iterable[str]) -> None:
    for override in overrides:
        key = override.partition("=")[0]
        if key.partition(".")[0] in ("task", "model") or key in ("training", "training.output_dir"):
            raise ValueError(f"{key} is fixed by the run, expected only overrides of data and of other training fields")


def _load_model(folder: Path) -> PreTrainedModel:
    try:
        return AutoModelForSequenceClassification.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise ValueError(f"{folder} holds no complete model: {error}") from error


def evaluate(folder: str | os.PathLike, *, split: str = "test", overrides: list[str] | None = None) -> dict[str, Any]:
    """Evaluate the model of a run, and write {split}_metrics.json beside it.

    Args:
        folder: what `train` wrote.
        split: "train", "validation" or "test".
        overrides: of the run's recipe, such as "data.directory=...". The model and training.output_dir are fixed.

    Returns:
        The content of the file: the model's loss and accuracy and, under "baselines", the accuracies of answers
        that cost nothing.

    Raises:
        FileNotFoundError: the folder holds no finished run.
        ValueError: the split, an override or the saved model is not as expected.
    """
    folder = Path(folder)
    overrides = overrides or []
    _check_run(folder)
    _check_evaluation_overrides(overrides)
    recipe = Recipe.load(folder / RECIPE_FILE, overrides)
    recipe = dataclasses.replace(recipe, training={**recipe.training, "output_dir": str(folder)})
    task = recipe.make_task()
    if split not in task.splits:
        raise ValueError(f"split is {split!r}, expected one of {', '.join(task.splits)}")
    dataset = task.dataset(split)
    trainer = _make_trainer(
        model=_load_model(folder),
        args=recipe.training_arguments(),
        data_collator=task.collator(),
        eval_dataset=dataset,
    )
    metrics = trainer.evaluate(metric_key_prefix=split)
    metrics["baselines"] = task.baselines(dataset if split == "train" else task.dataset("train"), dataset)
    if trainer.is_world_process_zero():
        _write_json(folder / f"{split}_metrics.json", metrics)
    return metrics
