"""The tasks that a recipe can name: what a task's data is, and what an answer costs that costs nothing."""

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch.utils.data import Dataset

from ..data import image, listops
from ..data.baselines import majority_accuracy


@dataclasses.dataclass
class ListOpsTask:
    """Long Range Arena ListOps.

    Args:
        directory: of the published files basic_train.tsv, basic_val.tsv and basic_test.tsv.
        max_length: tokens that are read of an expression.
        generate: options of `spade_ext.data.listops.generate` with which `spade-ext data` makes the files.
    """

    directory: str
    max_length: int = 2000
    generate: dict[str, Any] = dataclasses.field(default_factory=dict)

    generate_options: ClassVar[dict[str, Any]] = {
        name: parameter.annotation
        for name, parameter in inspect.signature(listops.generate).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    splits: ClassVar[tuple[str, ...]] = tuple(listops.FILES)

    @property
    def model_options(self) -> dict[str, Any]:
        """Fields of SpadeConfig that the task fixes."""
        return {
            "vocab_size": listops.VOCAB_SIZE,
            "input_size": None,
            "num_labels": listops.NUM_LABELS,
            "pad_token_id": listops.PAD_ID,
        }

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return self.max_length

    def blank(self, length: int) -> dict[str, Any]:
        """An item of `length` tokens that says nothing, to count what it costs."""
        return {"input_ids": torch.zeros(length, dtype=torch.int64), "labels": 0}

    def make_data(self) -> str:
        """Generate the files, unless the directory already holds exactly them, and say where they are."""
        if not listops.matches(self.directory, **self.generate):
            listops.generate(self.directory, **self.generate)
        return self.directory

    def dataset(self, split: str) -> Dataset:
        return listops.ListOps(Path(self.directory) / listops.FILES[split], max_length=self.max_length)

    def collator(self) -> Callable:
        return listops.Collator()

    def baselines(self, train: Dataset, test: Dataset) -> dict[str, float]:
        """Accuracies on `test`, 0 to 1, of answers that need no model but the labels of `train`."""
        return {
            "majority class": majority_accuracy(train, test),
            "root operator": listops.root_operator_accuracy(train, test),
        }


@dataclasses.dataclass
class ImageTask:
    """Long Range Arena Image: CIFAR-10 in grey, a token a pixel.

    Args:
        directory: of CIFAR-10's Python version, data_batch_1 to data_batch_5 and test_batch.
        grayscale, validation, normalization: see `spade_ext.data.image.Image`.
        mask_black: black pixels are padding, see `spade_ext.data.image.Collator`.
    """

    directory: str
    grayscale: Literal["tensorflow", "pillow"] = "tensorflow"
    validation: Literal["last", "random"] = "last"
    normalization: list[float] | None = None
    mask_black: bool = False

    generate_options: ClassVar[dict[str, Any]] = {}
    splits: ClassVar[tuple[str, ...]] = image.SPLITS
    length: ClassVar[int] = image.LENGTH

    def __post_init__(self):
        if self.mask_black and self.normalization is not None:
            raise ValueError("mask_black is True beside a normalization, expected ids: padding is the id 0")

    @property
    def model_options(self) -> dict[str, Any]:
        """Fields of SpadeConfig that the task fixes."""
        return {
            "vocab_size": image.VOCAB_SIZE,
            "input_size": None if self.normalization is None else 1,
            "num_labels": image.NUM_LABELS,
            "pad_token_id": None,
        }

    def blank(self, length: int) -> dict[str, Any]:
        """An item of `length` pixels that says nothing, to count what it costs."""
        if self.normalization is None:
            return {"input_ids": torch.zeros(length, dtype=torch.int64), "labels": 0}
        return {"input_values": torch.zeros(length, 1), "labels": 0}

    def make_data(self) -> str:
        """Read all files, which cannot be made, and say what was found."""
        sizes = ", ".join(f"{len(self.dataset(split)):,} {split}" for split in self.splits)
        return f"{sizes} images in {self.directory}"

    def dataset(self, split: str) -> Dataset:
        return image.Image(
            self.directory,
            split,
            grayscale=self.grayscale,
            validation=self.validation,
            normalization=self.normalization,
        )

    def collator(self) -> Callable:
        return image.Collator(self.mask_black)

    def baselines(self, train: Dataset, test: Dataset) -> dict[str, float]:
        """Accuracies on `test`, 0 to 1, of answers that need no model but the images and labels of `train`."""
        return {
            "majority class": majority_accuracy(train, test),
            "nearest mean": image.nearest_mean_accuracy(train, test),
        }


TASKS = {"listops": ListOpsTask, "image": ImageTask}
