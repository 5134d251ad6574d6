"""The command `spade-ext`."""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_TRAIN_PACKAGES = (
    "accelerate",
    "huggingface_hub",
    "matplotlib",
    "numpy",
    "safetensors",
    "tqdm",
    "transformers",
    "yaml",
)
_EPILOG = "Fields of a recipe are overridden by KEY=VALUE, for example training.max_steps=100 model.window=[64,64]."
_CONVERT_EPILOG = (
    "Fields of SpadeConfig are given by KEY=VALUE: those that the tensors do not tell, for example window=[511,0], and "
    "those in which a model is not the usual one. docs/models.md names them."
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spade-ext", description="Train, evaluate and convert SPADE models.", epilog=_EPILOG
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, about: str, epilog: str = _EPILOG, **positionals: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=about, description=about, epilog=epilog)
        for positional, text in positionals.items():
            command.add_argument(positional, type=Path, help=text)
        command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="see below")
        return command

    add("data", "Make or check the data that a recipe names.", recipe="a YAML recipe")
    add("train", "Train a recipe's model; the run goes to training.output_dir.", recipe="a YAML recipe")
    add("info", "Say what a recipe's model costs by length.", recipe="a YAML recipe")
    evaluate = add("evaluate", "Evaluate a run's model.", run="a folder that `spade-ext train` wrote")
    evaluate.add_argument("--split", default="test", help="train, validation or test (default: %(default)s)")
    add(
        "convert",
        "Make a model of published weights, or published weights of a model.",
        _CONVERT_EPILOG,
        input="a file of published tensors (torch.save, safetensors), or a folder that save_pretrained wrote",
        output="the folder, or the file (.pt, .safetensors), to write; it must not be there",
    )
    return parser


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)  # the rest: overrides after an option
    if unknown := [text for text in rest if text.startswith("-") or "=" not in text]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    arguments.overrides += rest
    return arguments


def _is_first() -> bool:
    """Whether this is the only process or, of those that torchrun started, the one that speaks and writes."""
    return int(os.environ.get("RANK", 0)) == 0


@contextmanager
def _processes() -> Iterator[None]:
    """What several processes do together: the first one reports an error, and they part at the end.

    An error is one of all processes, or follows from that of another one, whose end torchrun answers by ending all. So
    the others wait for that, and only what concerns them alone is reported by them.
    """
    try:
        yield
    except Exception:
        if not _is_first():
            time.sleep(5)
        raise
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def _prepare() -> None:
    from transformers.utils import logging

    from . import keep_memory

    keep_memory()
    logging.disable_progress_bar()  # those of weights; the Trainer's stay


def _data(arguments: argparse.Namespace) -> None:
    from .train import Recipe

    task = Recipe.load(arguments.recipe, arguments.overrides).make_task()
    if _is_first():
        print(f"data: {task.make_data()}")


def _train(arguments: argparse.Namespace) -> None:
    from .train import Recipe, train
    from .train.run import CURVES_FILE

    _prepare()
    recipe = Recipe.load(arguments.recipe, arguments.overrides)
    metrics = train(recipe)
    if not _is_first():
        return
    folder = Path(recipe.training["output_dir"])
    steps, seconds = metrics["history"][-1]["step"], metrics["train_runtime"]
    print(f"validation accuracy: {metrics['eval_accuracy']:.1%} after {steps:,} steps, {seconds:.0f} s since the start")
    print(f"checkpoint: {folder}\npicture:    {folder / CURVES_FILE}")


def _info(arguments: argparse.Namespace) -> None:
    from .train import Recipe
    from .train.cost import recipe_costs, training_memory

    if not _is_first():
        return
    recipe = Recipe.load(arguments.recipe, arguments.overrides)
    batch, length = recipe.training_arguments().per_device_train_batch_size, recipe.make_task().length
    model, costs = recipe_costs(recipe, sorted({256, 1024, 4096, 16384, length}))
    constant = training_memory(model)
    print(f"parameters: {model.num_parameters():,}")
    print(f"with gradients and AdamW's moments: {constant / 1e6:,.1f} MB in float32")
    print(f"\nsequences in batches of {batch}; the recipe's length is {length:,}")
    print(f"{'':8}{'GFLOP a sequence':>26}{'of which':>26}{'MB a batch':>24}")
    print("  length   forward    + backward    linear  attention   ssm    activations     total")
    for length, cost in costs.items():
        flops = {kind: cost.forward[kind] + cost.backward[kind] for kind in cost.forward}
        both = sum(flops.values())
        shares = "".join(f"{share / both:>9.0%}" for share in flops.values())
        forward = sum(cost.forward.values()) / batch / 1e9
        print(
            f"{length:8,}{forward:>10.3f}{both / batch / 1e9:>14.3f} {shares}"
            f"{cost.activations / 1e6:>15,.0f}{(constant + cost.activations) / 1e6:>10,.0f}"
        )


def _evaluate(arguments: argparse.Namespace) -> None:
    from .train import evaluate

    _prepare()
    split = arguments.split
    metrics = evaluate(arguments.run, split=split, overrides=arguments.overrides)
    if not _is_first():
        return
    rows = {"SPADE": metrics[f"{split}_accuracy"], **metrics["baselines"]}
    print(f"accuracy on the {split} split")
    for name, value in rows.items():
        print(f"  {name:16}{value:6.1%}")
    print(f"metrics: {arguments.run / f'{split}_metrics.json'}")


def _convert(arguments: argparse.Namespace) -> None:
    from .models.published_files import convert_to_ours, convert_to_published
    from .train.recipe import model_options

    _prepare()
    options = model_options(arguments.overrides)
    if arguments.input.is_dir():
        if options:
            raise ValueError(
                f"{next(iter(options))} is given, expected no fields: {arguments.input} is a folder of ours"
            )
        model, left_out = convert_to_published(arguments.input, arguments.output), []
    else:
        model, left_out = convert_to_ours(arguments.input, arguments.output, **options)
    print(f"{type(model).__name__}, {model.num_parameters():,} parameters: {arguments.output}")
    if left_out:
        print(f"left out, as our classifier is another one: {', '.join(left_out)}")


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _fail(message: str, code: int = 2) -> int:
    print(f"spade-ext: {message}", file=sys.stderr)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; what a user got wrong is one sentence on stderr and exit code 2."""
    arguments = _parse(argv)
    commands = {"data": _data, "train": _train, "info": _info, "evaluate": _evaluate, "convert": _convert}
    command = commands[arguments.command]
    try:
        with _processes():
            command(arguments)
    except (ValueError, OSError) as error:
        return _fail(_sentence(error))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _TRAIN_PACKAGES:
            raise
        return _fail(f"{error.name} is not installed, run `pip install 'spade-ext[train]'`")
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    return 0
