from pathlib import Path

import pytest
import yaml

from spade_ext.models import SpadeConfig
from spade_ext.train import Recipe

RECIPE = """\
task: listops
data: {directory: data/listops}
model: {hidden_size: 32, num_attention_heads: 4, window: [4, 4]}
training: {output_dir: runs/a, learning_rate: 1e-3, report_to: none, use_cpu: true}
"""


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_a_recipe_gives_task_model_and_training(recipe_file):
    recipe = Recipe.load(recipe_file)
    assert recipe.make_task().directory == "data/listops"
    config = recipe.model_config()
    assert isinstance(config, SpadeConfig)
    assert (config.hidden_size, config.vocab_size, config.num_labels) == (32, 16, 10)
    assert recipe.training_arguments().learning_rate == 1e-3


def test_every_field_can_be_overridden(recipe_file):
    overrides = ["model.hidden_size=64", "training.learning_rate=2e-4", "data.generate.train=5", "model.window=[1,2]"]
    recipe = Recipe.load(recipe_file, overrides)
    assert recipe.model["hidden_size"] == 64 and recipe.model["window"] == [1, 2]
    assert recipe.training["learning_rate"] == 2e-4
    assert recipe.data["generate"] == {"train": 5}


def test_values_that_yaml_1_1_reads_otherwise(recipe_file):
    recipe = Recipe.load(recipe_file, ["training.eval_strategy=no", "training.adam_epsilon=1e-8", "training.bf16=true"])
    assert recipe.training["eval_strategy"] == "no"
    assert recipe.training["adam_epsilon"] == 1e-8
    assert recipe.training["bf16"] is True


def test_a_saved_recipe_is_the_same(recipe_file, tmp_path):
    recipe = Recipe.load(recipe_file)
    recipe.save(tmp_path / "saved.yaml")
    assert Recipe.load(tmp_path / "saved.yaml") == recipe
    assert list(yaml.safe_load((tmp_path / "saved.yaml").read_text())) == ["task", "data", "model", "training"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.hiden_size=3", "model.hiden_size is not a known key, the nearest is model.hidden_size"),
        ("data.max_lenth=3", "data.max_lenth is not a known key, the nearest is data.max_length"),
        ("training.max_step=3", "training.max_step is not a known key, the nearest is training.max_steps"),
        ("tasks=listops", "tasks is not a known key, the nearest is task"),
        ("task=listop", "task is 'listop', expected one of listops"),
        ("model.hidden_size=abc", "model.hidden_size is 'abc', expected int"),
        ("model.window=16", r"model.window is 16, expected list\[int\] \| tuple\[int, ...\]"),
        ("model.ssm_kind=s5", "model.ssm_kind is 's5', expected 's4' or 's4d' or 'ema'"),
        ("training.eval_strategy=never", "training.eval_strategy is 'never', expected 'no' or 'steps' or 'epoch'"),
        ("model.window=[3]", r"model: window is \[3\], expected \(left, right\), both 0 or more"),
        ("training.learning_rate=fast", "training.learning_rate is 'fast', expected float"),
        ("training.max_steps=1.5", "training.max_steps is 1.5, expected int"),
        ("data.max_length=long", "data.max_length is 'long', expected int"),
        ("data.generate.trian=5", "data.generate.trian is not a known key, the nearest is data.generate.train"),
        ("data.generate.directory=x", "data.generate.directory is not a known key, the nearest is data.generate."),
        ("data.generate.seed=one", "data.generate.seed is 'one', expected int"),
        ("data.generate=3", "data.generate is 3, expected dict"),
        ("data={}", "data.directory is missing, expected str"),
        ("task=[listops]", r"task is \['listops'\], expected one of listops"),
        ("model.vocab_size=8", "model.vocab_size is fixed by the task listops, expected it to be left out"),
        ("model.num_labels=3", "model.num_labels is fixed by the task listops, expected it to be left out"),
        ("data=3", "data is 3, expected keys and values"),
        ("training.output_dir=", "training.output_dir is missing, expected the folder that the run is written to"),
        ("hidden_size", "override is 'hidden_size', expected KEY=VALUE such as model.hidden_size=128"),
        ("task.name=3", "override is 'task.name=3', but task holds no keys"),
        ("model.window=[3", "expected YAML"),
    ],
)
def test_errors_name_the_file_and_the_key(recipe_file, override, message):
    with pytest.raises(ValueError, match=message) as error:
        Recipe.load(recipe_file, [override])
    text = str(error.value)
    assert text.startswith(f"{recipe_file}: ") and "\n" not in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the content is NoneType, expected keys task, data, model, training"),
        ("task: listops\n", "data is missing, expected the keys task, data, model, training"),
        ("task: [listops\n", "line 2: .*, expected YAML"),
    ],
)
def test_errors_of_a_broken_file(tmp_path, content, message):
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        Recipe.load(path)


def test_error_of_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.yaml is not a file, expected a recipe such as"):
        Recipe.load(Path(tmp_path) / "nothing.yaml")
