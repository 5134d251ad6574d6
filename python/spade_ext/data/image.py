"""Image of Long Range Arena: CIFAR-10 in grey, a token a pixel, from the official Python batches.

Sources: Krizhevsky 2009 (CIFAR-10), Tay et al. 2021 (arXiv:2011.04006).
"""

import io
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

SIDE = 32
LENGTH = SIDE * SIDE
VOCAB_SIZE = 256
NUM_LABELS = 10
TRAIN_FILES = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST_FILE = "test_batch"
SPLITS = ("train", "validation", "test")

_RECONSTRUCT = np.empty(0).__reduce__()[0]
_ADMITTED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
}


class _BatchUnpickler(pickle.Unpickler):
    """Makes what a batch consists of and nothing else: dicts, lists, bytes, numbers and numpy arrays."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _ADMITTED[module, name]


def _unpickle(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not a file, expected the files {TRAIN_FILES[0]} to {TRAIN_FILES[-1]} and {TEST_FILE} of "
            "CIFAR-10's Python version"
        )
    content = io.BytesIO(path.read_bytes())
    try:
        return _BatchUnpickler(content, encoding="bytes").load()
    except Exception as error:  # a broken pickle raises almost anything
        size = len(content.getbuffer())
        place = f"byte {content.tell():,} of {size:,}"
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(f"{path}, {place}: {reason}, expected a batch of CIFAR-10's Python version") from None


def read_batch(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    """Read one of CIFAR-10's Python batches; no code that the pickle names is run.

    Returns:
        images (N, 32, 32, 3) uint8, red, green, blue; labels (N,) int64, 0 to 9.

    Raises:
        FileNotFoundError, ValueError: one sentence that names the file, the place in it and what was expected.
    """
    path = Path(path)
    batch = _unpickle(path)
    keys = batch if isinstance(batch, dict) else ()
    for key in (b"data", b"labels"):
        if key not in keys:
            raise ValueError(f"{path}: {key.decode()} is missing, expected a batch of CIFAR-10's Python version")
    data, labels = batch[b"data"], batch[b"labels"]
    if not (isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.shape[1:] == (3 * LENGTH,) and len(data)):
        found = f"{data.dtype} of shape {list(data.shape)}" if isinstance(data, np.ndarray) else type(data).__name__
        raise ValueError(
            f"{path}: data is {found}, expected uint8 of shape [N, {3 * LENGTH}], N images of {SIDE} x {SIDE} pixels"
        )
    if not isinstance(labels, list) or len(labels) != len(data):
        found = f"{len(labels):,} numbers" if isinstance(labels, list) else type(labels).__name__
        raise ValueError(f"{path}: labels is {found}, expected a list of {len(data):,}, one for each image of data")
    for index, label in enumerate(labels):
        if type(label) is not int or not 0 <= label < NUM_LABELS:
            raise ValueError(f"{path}, image {index}: the label is {label!r}, expected an integer from 0 to 9")
    return data.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1), np.array(labels)


def to_grey(images: np.ndarray, how: Literal["tensorflow", "pillow"]) -> np.ndarray:
    """(..., 3) uint8, red, green, blue, to (...) uint8; the two ways differ by at most 1.

    "tensorflow" is `tf.image.rgb_to_grayscale`, which Long Range Arena uses, "pillow" Pillow's `convert("L")`, which
    torchvision and so S4 and MEGA use.
    """
    if how == "tensorflow":
        grey = (images / np.float32(255)) @ np.array([0.2989, 0.5870, 0.1140], np.float32)
        return (grey * np.float32(255.5)).astype(np.uint8)
    if how == "pillow":
        return ((images @ np.array([19595, 38470, 7471]) + (1 << 15)) >> 16).astype(np.uint8)
    raise ValueError(f"grayscale is {how!r}, expected 'tensorflow' or 'pillow'")


def _validation_order(size: int, how: Literal["last", "random"]) -> torch.Tensor:
    if how == "last":
        return torch.arange(size)
    if how == "random":
        return torch.randperm(size, generator=torch.Generator().manual_seed(42))
    raise ValueError(f"validation is {how!r}, expected 'last' or 'random'")


class Image(Dataset):
    """One split of CIFAR-10 in grey, in memory, a byte a pixel.

    Item: {"input_ids": (1024,) int64, grey values 0 to 255, row by row; "labels": int from 0 to 9}; with
    `normalization`, "input_values" (1024, 1) float32 in place of the ids.

    Args:
        directory: of the files data_batch_1 to data_batch_5 and test_batch, each with any number of images.
        split: "train" or "validation", nine tenths and one tenth of the five batches, or "test".
        grayscale: see `to_grey`.
        validation: "last" takes the last tenth of the images, as Long Range Arena does (in an order of its own);
            "random" the last tenth of torch's permutation with seed 42, which is the split of S4 and MEGA.
        normalization: mean and standard deviation of grey values from 0 to 1, by which they become numbers, (0.4808,
            0.2392) in S4 and (0.48, 0.24) in MEGA; None for ids, as Long Range Arena has them.

    Attributes:
        images: (N, 1024) uint8.
        labels: (N,) int64.

    Raises:
        FileNotFoundError, ValueError: see `read_batch`.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        split: Literal["train", "validation", "test"],
        *,
        grayscale: Literal["tensorflow", "pillow"] = "tensorflow",
        validation: Literal["last", "random"] = "last",
        normalization: Sequence[float] | None = None,
    ):
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
        if normalization is not None and (len(normalization) != 2 or normalization[1] <= 0):
            raise ValueError(f"normalization is {list(normalization)}, expected a mean and a positive deviation")
        self.normalization = normalization
        batches = [read_batch(Path(directory) / name) for name in ([TEST_FILE] if split == "test" else TRAIN_FILES)]
        self.images = torch.from_numpy(np.concatenate([to_grey(images, grayscale) for images, _ in batches])).flatten(1)
        self.labels = torch.from_numpy(np.concatenate([labels for _, labels in batches]))
        if split != "test":
            order = _validation_order(len(self.labels), validation)
            size = int(0.9 * len(order))
            chosen = order[:size] if split == "train" else order[size:]
            self.images, self.labels = self.images[chosen], self.labels[chosen]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        label = int(self.labels[index])
        if self.normalization is None:
            return {"input_ids": self.images[index].long(), "labels": label}
        mean, deviation = self.normalization
        return {"input_values": (self.images[index, :, None] / 255 - mean) / deviation, "labels": label}


class Collator:
    """Stacks items of `Image`: {"input_ids": (B, 1024) int64 or "input_values": (B, 1024, 1), "labels": (B,) int64}.

    With `mask_black`, also "attention_mask" (B, 1024) bool, False at black pixels: the baseline of Long Range Arena
    takes their value, 0, for padding.
    """

    def __init__(self, mask_black: bool = False):
        self.mask_black = mask_black

    def __call__(self, items: Sequence[dict[str, torch.Tensor | int]]) -> dict[str, torch.Tensor]:
        batch = {name: torch.stack([item[name] for item in items]) for name in items[0] if name != "labels"}
        if self.mask_black:
            batch["attention_mask"] = batch["input_ids"] != 0
        return {**batch, "labels": torch.tensor([item["labels"] for item in items])}


def nearest_mean_accuracy(train: Image, test: Image) -> float:
    """Accuracy on `test`, 0 to 1, of answering the label whose mean image in `train` is nearest."""
    present = train.labels.unique()
    means = torch.stack([train.images[train.labels == label].float().mean(0) for label in present])
    answers = present[torch.cdist(test.images.float(), means).argmin(1)]
    return (test.labels == answers).double().mean().item()
