import os
import pickle
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage

from spade_ext.data import image
from spade_ext.data.baselines import majority_accuracy
from spade_ext.data.image import Collator, Image, read_batch, to_grey

FILES = [*image.TRAIN_FILES, image.TEST_FILE]
REAL = Path(__file__).parents[3] / "shared/data/cifar-10-batches-py"


def random_batch(size, seed=0):
    random = np.random.default_rng(seed)
    data = random.integers(0, 256, (size, 3072), dtype=np.uint8)
    return {b"data": data, b"labels": random.integers(0, 10, size).tolist(), b"batch_label": b"training batch 1 of 5"}


def write(path, content, protocol=4):
    path.write_bytes(pickle.dumps(content, protocol))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six batches of 20 images, image i of all 120 with red = green = blue = i in its first pixel."""
    folder = tmp_path_factory.mktemp("cifar")
    for number, name in enumerate(FILES):
        batch = random_batch(20, number)
        batch[b"data"][:, ::1024] = np.arange(20 * number, 20 * number + 20)[:, None]
        write(folder / name, batch)
    return folder


class Python2Pickler(pickle._Pickler):
    """Writes text as the published files have it, which Python 2 pickled."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_string(self, value):
        value = value.encode() if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = save_string


def test_read_batch(tmp_path):
    batch = random_batch(3)
    images, labels = read_batch(write(tmp_path / "batch", batch))
    assert images.shape == (3, 32, 32, 3) and images.dtype == np.uint8
    for channel in range(3):
        assert images[2, 5, 7, channel] == batch[b"data"][2, 1024 * channel + 32 * 5 + 7]
    assert labels.tolist() == batch[b"labels"]


def test_a_batch_that_python_2_wrote(tmp_path):
    batch = random_batch(3)
    with open(tmp_path / "written", "wb") as file:
        Python2Pickler(file, 2).dump(batch)
    content = (tmp_path / "written").read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert b"numpy.core.multiarray\n_reconstruct" in content
    (tmp_path / "batch").write_bytes(content)
    images, labels = read_batch(tmp_path / "batch")
    assert np.array_equal(images.transpose(0, 3, 1, 2).reshape(3, -1), batch[b"data"])
    assert labels.tolist() == batch[b"labels"]


def test_pillow_grey_is_pillows():
    rgb = random_batch(50)[b"data"].reshape(50, 32, 32, 3)
    expected = np.stack([np.asarray(PillowImage.fromarray(one).convert("L")) for one in rgb])
    assert np.array_equal(to_grey(rgb, "pillow"), expected)


def test_tensorflow_grey():
    rgb = np.array(
        [[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255], [1, 0, 0], [10, 20, 30]], np.uint8
    )
    # Truncated from 255.5 * (0.2989 r + 0.5870 g + 0.1140 b) / 255, in which the weights add up to 0.9999.
    assert to_grey(rgb, "tensorflow").tolist() == [0, 255, 76, 149, 29, 0, 18]
    assert to_grey(rgb, "pillow").tolist() == [0, 255, 76, 150, 29, 0, 18]


def first_pixels(directory, split, **options):
    return [item["input_ids"][0].item() for item in Image(directory, split, grayscale="pillow", **options)]


def test_splits(folder):
    assert first_pixels(folder, "train") == list(range(90))
    assert first_pixels(folder, "validation") == list(range(90, 100))
    assert first_pixels(folder, "test") == list(range(100, 120))


def test_the_random_split_is_that_of_torch(folder):
    parts = torch.utils.data.random_split(range(100), [90, 10], torch.Generator().manual_seed(42))
    assert first_pixels(folder, "train", validation="random") == list(parts[0])
    assert first_pixels(folder, "validation", validation="random") == list(parts[1])
    assert first_pixels(folder, "test", validation="random") == list(range(100, 120))


def test_items(folder):
    dataset = Image(folder, "test", grayscale="tensorflow")
    images, labels = read_batch(folder / "test_batch")
    grey = to_grey(images, "tensorflow").reshape(20, 1024)
    for item, row, label in zip(dataset, grey, labels, strict=True):
        assert item["input_ids"].dtype == torch.int64
        assert item["input_ids"].tolist() == row.tolist() and item["labels"] == label
    assert dataset.labels.tolist() == labels.tolist() and len(dataset) == 20


def test_collator():
    items = [{"input_ids": torch.tensor([0, 3]), "labels": 1}, {"input_ids": torch.tensor([4, 255]), "labels": 9}]
    batch = Collator()(items)
    assert set(batch) == {"input_ids", "labels"}
    assert batch["input_ids"].tolist() == [[0, 3], [4, 255]] and batch["labels"].tolist() == [1, 9]
    masked = Collator(mask_black=True)(items)
    assert masked["attention_mask"].tolist() == [[False, True], [True, True]]


@pytest.mark.parametrize(("mean", "deviation"), [(122.6 / 255, 61 / 255), (0.48, 0.24)])
def test_normalized_pixels(folder, mean, deviation):
    ids = Image(folder, "test")
    normalized = Image(folder, "test", normalization=(mean, deviation))
    items = [normalized[index] for index in (0, 3)]
    assert items[0]["input_values"].dtype == torch.float32 and set(items[0]) == {"input_values", "labels"}
    for item, index in zip(items, (0, 3), strict=True):
        expected = (ids[index]["input_ids"].double() / 255 - mean) / deviation
        torch.testing.assert_close(item["input_values"][:, 0].double(), expected, rtol=1e-6, atol=1e-6)
        assert item["labels"] == ids[index]["labels"]
    batch = Collator()(items)
    assert set(batch) == {"input_values", "labels"} and batch["input_values"].shape == (2, 1024, 1)
    assert torch.equal(batch["input_values"][1], items[1]["input_values"])


def test_baselines(folder):
    train, test = Image(folder, "test"), Image(folder, "test")
    train.images, train.labels = torch.tensor([[0, 0], [2, 0], [9, 9]], dtype=torch.uint8), torch.tensor([3, 3, 7])
    test.images, test.labels = torch.tensor([[1, 1], [6, 7], [9, 0]], dtype=torch.uint8), torch.tensor([3, 7, 7])
    assert image.nearest_mean_accuracy(train, test) == pytest.approx(2 / 3)
    assert majority_accuracy(train, test) == pytest.approx(1 / 3)


class Command:
    def __reduce__(self):
        return os.system, ("echo ran",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({b"data": None}, "data is NoneType, expected uint8 of shape [N, 3072], N images of 32 x 32 pixels"),
        (
            {b"data": np.zeros((4, 1024), np.uint8)},
            "data is uint8 of shape [4, 1024], expected uint8 of shape [N, 3072]",
        ),
        ({b"data": np.zeros((4, 3072))}, "data is float64 of shape [4, 3072], expected uint8"),
        ({b"data": np.zeros((0, 3072), np.uint8)}, "data is uint8 of shape [0, 3072], expected uint8"),
        ({b"labels": [1, 2, 3]}, "labels is 3 numbers, expected a list of 4, one for each image of data"),
        ({b"labels": 3}, "labels is int, expected a list of 4"),
        ({b"labels": [1, 2, 10, 3]}, "image 2: the label is 10, expected an integer from 0 to 9"),
        ({b"labels": [1, -1, 1, 3]}, "image 1: the label is -1, expected an integer from 0 to 9"),
        ({b"labels": [1, 2, 1, "cat"]}, "image 3: the label is 'cat', expected an integer from 0 to 9"),
    ],
)
def test_malformed_batch_is_refused(tmp_path, change, message):
    path = write(tmp_path / "data_batch_1", {**random_batch(4), **change})
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}[:,] {re.escape(message)}"):
        read_batch(path)


@pytest.mark.parametrize("content", [[1, 2], {b"fine_labels": [1]}, {b"data": np.zeros((1, 3072), np.uint8)}])
def test_another_pickle_is_refused(tmp_path, content):
    path = write(tmp_path / "train", content)
    with pytest.raises(ValueError, match=r"(data|labels) is missing, expected a batch of CIFAR-10's Python version$"):
        read_batch(path)


@pytest.mark.parametrize("size", [0, 1, 100, 5000, 12000])
def test_truncated_batch_is_refused(tmp_path, size):
    content = pickle.dumps({b"labels": [3] * 4, b"data": np.zeros((4, 3072), np.uint8)}, 4)
    path = tmp_path / "data_batch_2"
    path.write_bytes(content[:size])
    with pytest.raises(
        ValueError, match=rf"^{re.escape(str(path))}, byte [\d,]+ of {size:,}: [^\n]+, expected a batch of"
    ):
        read_batch(path)


def test_arbitrary_bytes_are_refused(tmp_path):
    random = np.random.default_rng(0)
    whole = pickle.dumps(random_batch(1), 4)
    for trial in range(300):
        broken = bytearray(whole)
        for place in random.integers(0, len(whole), 4) % (len(whole) if trial % 2 else 200):
            broken[place] = random.integers(256)
        path = tmp_path / "data_batch_3"
        path.write_bytes(broken)
        try:
            read_batch(path)  # what changed may have been pixels
        except ValueError as error:
            assert str(error).startswith(str(path)) and "expected" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("content", [Command(), {b"data": Command(), b"labels": [0]}])
def test_code_in_a_pickle_is_not_run(tmp_path, capfd, content):
    path = write(tmp_path / "data_batch_4", content)
    with pytest.raises(ValueError, match=r"it asks for \w+\.system, expected a batch of CIFAR-10's Python version"):
        read_batch(path)
    assert "ran" not in capfd.readouterr().out


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_needed(folder, tmp_path, name):
    for path in folder.iterdir():
        if path.name != name:
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(
        FileNotFoundError, match=rf"{name} is not a file, expected the files data_batch_1 to data_batch_5"
    ):
        for split in image.SPLITS:
            Image(tmp_path, split)


def test_a_folder_in_the_place_of_a_file(folder, tmp_path):
    (tmp_path / "test_batch").mkdir()
    with pytest.raises(
        FileNotFoundError, match="test_batch is not a file, expected the files data_batch_1 to data_batch_5"
    ):
        Image(tmp_path, "test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, "split is 'dev', expected one of train, validation, test"),
        ({"split": "train", "grayscale": "cv2"}, "grayscale is 'cv2', expected 'tensorflow' or 'pillow'"),
        ({"split": "train", "validation": "first"}, "validation is 'first', expected 'last' or 'random'"),
        (
            {"split": "train", "normalization": [0.5, 0]},
            r"normalization is \[0.5, 0\], expected a mean and a positive deviation",
        ),
        ({"split": "train", "normalization": [0.5]}, r"normalization is \[0.5\], expected a mean and a positive .*"),
    ],
)
def test_options_are_refused(folder, options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Image(folder, **options)


@pytest.mark.skipif(not REAL.is_dir(), reason="the folder of real CIFAR-10 images is not here")
def test_real_images():
    splits = {split: Image(REAL, split, grayscale="pillow", validation="random") for split in image.SPLITS}
    assert {split: len(dataset) for split, dataset in splits.items()} == {
        "train": 9000,
        "validation": 1000,
        "test": 2000,
    }
    assert splits["test"].labels.bincount().tolist() == [200] * 10
    assert 0.2 < image.nearest_mean_accuracy(splits["train"], splits["test"]) < 0.3
