"""The tasks that a recipe can name: what a task's data is, and what an answer costs that costs nothing."""

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

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

    model_options: ClassVar[dict[str, Any]] = {
        "vocab_size": listops.VOCAB_SIZE,
        "num_labels": listops.NUM_LABELS,
        "pad_token_id": listops.PAD_ID,
    }
    generate_options: ClassVar[dict[str, Any]] = {
        name: parameter.annotation
        for name, parameter in inspect.signature(listops.generate).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    splits: ClassVar[tuple[str, ...]] = tuple(listops.FILES)

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return self.max_length

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
        grayscale, validation: see `spade_ext.data.image.Image`.
        mask_black: black pixels are padding, see `spade_ext.data.image.Collator`.
    """

    directory: str
    grayscale: Literal["tensorflow", "pillow"] = "tensorflow"
    validation: Literal["last", "random"] = "last"
    mask_black: bool = False

    model_options: ClassVar[dict[str, Any]] = {
        "vocab_size": image.VOCAB_SIZE,
        "num_labels": image.NUM_LABELS,
        "pad_token_id": None,
    }
    generate_options: ClassVar[dict[str, Any]] = {}
    splits: ClassVar[tuple[str, ...]] = image.SPLITS
    length: ClassVar[int] = image.LENGTH

    def make_data(self) -> str:
        """Read all files, which cannot be made, and say what was found."""
        sizes = ", ".join(f"{len(self.dataset(split)):,} {split}" for split in self.splits)
        return f"{sizes} images in {self.directory}"

    def dataset(self, split: str) -> Dataset:
        return image.Image(self.directory, split, grayscale=self.grayscale, validation=self.validation)

    def collator(self) -> Callable:
        return image.Collator(self.mask_black)

    def baselines(self, train: Dataset, test: Dataset) -> dict[str, float]:
        """Accuracies on `test`, 0 to 1, of answers that need no model but the images and labels of `train`."""
        return {
            "majority class": majority_accuracy(train, test),
            "nearest mean": image.nearest_mean_accuracy(train, test),
        }


TASKS = {"listops": ListOpsTask, "image": ImageTask}
