import pickle
import shutil

import numpy as np
import pytest

from spade_ext.cli import main
from spade_ext.data import image
from spade_ext.models import SpadeForSequenceClassification
from spade_ext.train import Recipe

RECIPE = """\
task: image
data: {{directory: {directory}, grayscale: pillow, validation: random}}
model: {{hidden_size: 8, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 8, window: [1, 1],
  ssm_d_state: 4}}
training: {{output_dir: {output}, max_steps: 2, per_device_train_batch_size: 4, logging_steps: 1, save_strategy: "no",
  report_to: none, use_cpu: true, disable_tqdm: true}}
"""


@pytest.fixture
def recipe(tmp_path):
    """A recipe beside six batches of 10 images."""
    random = np.random.default_rng(0)
    folder = tmp_path / "cifar"
    folder.mkdir()
    for name in (*image.TRAIN_FILES, image.TEST_FILE):
        data = random.integers(0, 256, (10, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({b"data": data, b"labels": list(range(10))}))
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(directory=folder, output=tmp_path / "run"))
    return path


@pytest.mark.parametrize("options", [[], ["data.normalization=[0.48,0.24]"]], ids=["ids", "numbers"])
def test_images_are_found_trained_on_and_evaluated(recipe, capsys, options):
    assert main(["data", str(recipe)]) == 0
    directory = recipe.parent / "cifar"
    assert capsys.readouterr().out == f"data: 45 train, 5 validation, 10 test images in {directory}\n"
    assert main(["info", str(recipe), *options]) == 0
    assert main(["train", str(recipe), *options]) == 0
    assert main(["evaluate", str(recipe.parent / "run")]) == 0
    printed = capsys.readouterr().out
    assert "majority class   10.0%" in printed and "nearest mean" in printed


def test_black_is_a_pixel_like_others(recipe):
    model = SpadeForSequenceClassification(Recipe.load(recipe).model_config())
    assert model.model.embed_tokens.weight.shape == (256, 8)
    assert model.model.embed_tokens.weight[0].abs().min() > 0 and model.model.embed_tokens.padding_idx is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.grayscale=cv2"], "data.grayscale is 'cv2', expected 'tensorflow' or 'pillow'"),
        (["data.mask_black=1"], "data.mask_black is 1, expected bool"),
        (["data.directory=3"], "data.directory is 3, expected str"),
        (["data.normalization=0.5"], "data.normalization is 0.5, expected "),
        (
            ["data.normalization=[0.48,0.24]", "data.mask_black=true"],
            "data: mask_black is True beside a normalization, expected ids: padding is the id 0",
        ),
        (["data.generate={}"], "data.generate is not a known key"),
        (["model.pad_token_id=0"], "model.pad_token_id is fixed by the task image, expected it to be left out"),
    ],
)
def test_mistakes_in_the_recipe(recipe, capsys, overrides, message):
    assert main(["data", str(recipe), *overrides]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"spade-ext: {recipe}: {message}") and error.count("\n") == 1


def test_mistakes_in_the_data(recipe, capsys):
    path = recipe.parent / "cifar" / "data_batch_3"

    def complaint(command="data"):
        assert main([command, str(recipe)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"spade-ext: {path}") and error.count("\n") == 1
        return error

    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert f"byte {len(whole) // 2:,} of {len(whole) // 2:,}: " in complaint()
    path.write_bytes(pickle.dumps({b"data": np.zeros((1, 3 * 64 * 64), np.uint8), b"labels": [0]}))
    assert "data is uint8 of shape [1, 12288], expected uint8 of shape [N, 3072]" in complaint("train")
    path.write_bytes(pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 11]}))
    assert "image 1: the label is 11, expected an integer from 0 to 9" in complaint()
    path.unlink()
    assert "is not a file, expected the files data_batch_1 to data_batch_5 and test_batch" in complaint()
    shutil.rmtree(recipe.parent / "cifar")
    path = path.with_name("data_batch_1")
    assert "data_batch_1 is not a file" in complaint()
