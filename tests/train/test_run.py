import json

import pytest
import torch

from spade_ext.cli import main
from spade_ext.models import SpadeForSequenceClassification
from spade_ext.train import Recipe, SpadeTrainer, train

RECIPE = """\
task: listops
data:
  directory: {directory}
  generate: {{train: 200, validation: 50, test: 50, min_length: 3, max_length: 30, workers: 1}}
model: {{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32, window: [4, 4]}}
training: {{output_dir: {output}, max_steps: 6, eval_strategy: steps, eval_steps: 3, logging_steps: 2,
  save_strategy: "no", report_to: none, use_cpu: true, disable_tqdm: true, weight_decay: 0.1}}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A recipe that went through `spade-ext data` and `spade-ext train`, and the folder of its run."""
    folder = tmp_path_factory.mktemp("run")
    recipe, output = folder / "recipe.yaml", folder / "output"
    recipe.write_text(RECIPE.format(directory=folder / "data", output=output))
    assert main(["data", str(recipe)]) == 0
    assert main(["train", str(recipe)]) == 0
    return recipe, output


def test_a_run_leaves_model_recipe_metrics_and_picture(run):
    recipe, output = run
    SpadeForSequenceClassification.from_pretrained(output)
    assert Recipe.load(output / "recipe.yaml") == Recipe.load(recipe)
    metrics = json.loads((output / "train_metrics.json").read_text())
    assert metrics["parameters"] > 1000 and 0 <= metrics["eval_accuracy"] <= 1
    assert [entry["step"] for entry in metrics["history"] if "eval_accuracy" in entry] == [3, 6, 6]
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_evaluate_reports_the_model_beside_the_baselines(run, capsys):
    recipe, output = run
    assert main(["evaluate", str(output)]) == 0
    metrics = json.loads((output / "test_metrics.json").read_text())
    assert set(metrics["baselines"]) == {"majority class", "root operator"}
    printed = capsys.readouterr().out
    for name, value in {"SPADE": metrics["test_accuracy"], **metrics["baselines"]}.items():
        assert f"{name:16}{value:6.1%}" in printed

    task = Recipe.load(recipe).make_task()
    model = SpadeForSequenceClassification.from_pretrained(output).eval()
    rows = task.collator()([task.dataset("test")[i] for i in range(50)])
    with torch.no_grad():
        correct = model(rows["input_ids"], rows["attention_mask"]).logits.argmax(-1) == rows["labels"]
    assert metrics["test_accuracy"] == pytest.approx(correct.double().mean().item())


def test_data_is_made_once(run):
    recipe, _ = run
    files = sorted((recipe.parent / "data").iterdir())
    before = [file.stat().st_mtime_ns for file in files]
    assert main(["data", str(recipe)]) == 0
    assert [file.stat().st_mtime_ns for file in files] == before


def test_training_lowers_the_loss(run, tmp_path):
    recipe = Recipe.load(
        run[0], [f"training.output_dir={tmp_path}", "training.max_steps=150", "training.learning_rate=1e-2"]
    )
    losses = [entry["loss"] for entry in train(recipe)["history"] if "loss" in entry]
    assert sum(losses[-5:]) / 5 < losses[0] - 0.2


def test_the_trainer_uses_the_groups_that_modules_ask_for(run):
    recipe = Recipe.load(run[0], ["model.ssm_lr=1e-4"])
    model = SpadeForSequenceClassification(recipe.model_config())
    trainer = SpadeTrainer(model=model, args=recipe.training_arguments(), eval_dataset=[])
    groups = trainer.create_optimizer().param_groups
    assert {(group["lr"], group["weight_decay"]) for group in groups} == {(5e-5, 0.1), (5e-5, 0.0), (1e-4, 0.0)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "{recipe}"], "holds a run already, expected another folder"),
        (["train", "{recipe}", "model.hiden_size=3"], "model.hiden_size is not a known key"),
        (["train", "no.yaml"], "no.yaml is not a file, expected a recipe"),
        (["train", "{recipe}", "data.directory=none", "training.output_dir=x"], "basic_train.tsv does not exist"),
        (["evaluate", "nowhere"], "nowhere holds no recipe.yaml, expected the output_dir of `spade-ext train`"),
        (["evaluate", "{output}", "--split", "dev"], "split is 'dev', expected one of train, validation, test"),
    ],
)
def test_what_a_user_gets_wrong_is_one_sentence(run, capsys, arguments, message):
    recipe, output = run
    assert main([text.format(recipe=recipe, output=output) for text in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("spade-ext: ") and error.count("\n") == 1
