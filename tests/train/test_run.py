import json
import shutil

import pytest
import torch

import spade_ext.train
from spade_ext.cli import main
from spade_ext.models import SpadeForSequenceClassification
from spade_ext.train import Recipe, SpadeTrainer, train

RECIPE = """\
task: listops
data:
  directory: {directory}
  generate: {{train: 200, validation: 50, test: 50, min_length: 3, max_length: 30, workers: 1}}
model: {{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32, window: [4, 4],
  ssm_l_max: 32}}
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
    metrics = json.loads((output / "training.json").read_text())
    assert metrics["parameters"] > 1000 and 0 <= metrics["eval_accuracy"] <= 1
    assert [entry["step"] for entry in metrics["history"] if "eval_accuracy" in entry] == [3, 6]
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_evaluate_reports_the_model_beside_the_baselines(run, capsys):
    recipe, output = run
    assert main(["evaluate", str(output)]) == 0
    metrics = json.loads((output / "test_metrics.json").read_text())
    assert set(metrics["baselines"]) == {"majority class", "root operator"}
    printed, progress = capsys.readouterr()
    assert "Loading weights" not in progress
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
        run[0], [f"training.output_dir={tmp_path}", "training.max_steps=150", "training.learning_rate=3e-3"]
    )
    losses = [entry["loss"] for entry in train(recipe)["history"] if "loss" in entry]
    assert sum(losses[-10:]) / 10 < losses[0] - 0.1


def test_the_trainer_uses_the_groups_that_modules_ask_for(run):
    recipe = Recipe.load(run[0], ["model.ssm_lr=1e-4"])
    model = SpadeForSequenceClassification(recipe.model_config())
    trainer = SpadeTrainer(model=model, args=recipe.training_arguments(), eval_dataset=[])
    groups = trainer.create_optimizer().param_groups
    assert {(group["lr"], group["weight_decay"]) for group in groups} == {(5e-5, 0.1), (5e-5, 0.0), (1e-4, 0.0)}


def test_overrides_may_stand_before_and_after_an_option(run, capsys):
    _, output = run
    before = ["evaluate", str(output), "data.max_length=5", "--split", "validation"]
    after = ["evaluate", str(output), "--split", "validation", "data.max_length=5"]
    both = ["evaluate", str(output), "data.max_length=3", "--split", "validation", "data.max_length=5"]
    losses = []
    for arguments in (before, after, both):
        assert main(arguments) == 0
        losses.append(json.loads((output / "validation_metrics.json").read_text())["validation_loss"])
    assert losses[0] == losses[1] == losses[2]
    with pytest.raises(SystemExit):
        main(["evaluate", str(output), "--split", "validation", "stray"])
    assert "unrecognized arguments: stray" in capsys.readouterr().err


def test_a_moved_run_stays_where_it_is(run, tmp_path):
    recipe, output = run
    shutil.copytree(output, tmp_path / "copy")
    text = (output / "recipe.yaml").read_text().replace(str(output), str(tmp_path / "gone"))
    (tmp_path / "copy" / "recipe.yaml").write_text(text)
    assert main(["evaluate", str(tmp_path / "copy"), "--split", "test"]) == 0
    assert not (tmp_path / "gone").exists()


def test_resuming_continues_at_the_saved_step(run, tmp_path):
    overrides = [f"training.output_dir={tmp_path}", "training.save_strategy=steps", "training.save_steps=2"]
    first = train(Recipe.load(run[0], [*overrides, "training.max_steps=4"]))
    checkpoint = f"training.resume_from_checkpoint={tmp_path / 'checkpoint-4'}"
    resumed = train(Recipe.load(run[0], [*overrides, checkpoint, "training.max_steps=8"]))
    saved = [entry for entry in first["history"] if entry["step"] <= 4 and "loss" in entry]
    assert [entry for entry in resumed["history"] if "loss" in entry][: len(saved)] == saved
    assert [entry["step"] for entry in resumed["history"] if "loss" in entry] == [2, 4, 6, 8]


def test_a_start_that_failed_does_not_block_its_folder(run, tmp_path):
    arguments = ["train", str(run[0]), f"training.output_dir={tmp_path}", "training.max_steps=1"]
    assert main([*arguments, "training.report_to=nonsense"]) == 2
    assert main(arguments) == 0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", None, "holds no finished run: model.safetensors is missing, expected"),
        ("model.safetensors", "broken", "holds no complete model: "),
        ("config.json", "{", "holds no complete model: "),
        ("config.json", None, "holds no complete model: "),
    ],
)
def test_evaluating_an_incomplete_run_is_one_sentence(run, capsys, tmp_path, name, content, message):
    folder = tmp_path / "run"
    shutil.copytree(run[1], folder)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    assert main(["evaluate", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"spade-ext: {folder} {message}") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (NotADirectoryError(20, "Not a directory", "a/b"), 2, "Not a directory: a/b"),
        (ValueError("first\nsecond"), 2, "first"),
        (ModuleNotFoundError("", name="transformers.x"), 2, "run `pip install 'spade-ext[train]'`"),
        (KeyboardInterrupt(), 130, "spade-ext: interrupted"),
    ],
)
def test_errors_of_a_command(run, capsys, monkeypatch, raised, code, message):
    def fail(recipe):
        raise raised

    monkeypatch.setattr(spade_ext.train, "train", fail)
    assert main(["train", str(run[0])]) == code
    error = capsys.readouterr().err
    assert error.rstrip().endswith(message) and error.count("\n") == 1


@pytest.mark.parametrize("raised", [TypeError("a bug"), ModuleNotFoundError("a bug", name="ours")])
def test_bugs_keep_their_traceback(run, monkeypatch, raised):
    def fail(recipe):
        raise raised

    monkeypatch.setattr(spade_ext.train, "train", fail)
    with pytest.raises(type(raised), match="a bug"):
        main(["train", str(run[0])])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "{recipe}"], "holds a finished run, expected another folder, or a checkpoint of it"),
        (["train", "{recipe}", "model.hiden_size=3"], "model.hiden_size is not a known key"),
        (["train", "no.yaml"], "no.yaml is not a file, expected a recipe"),
        (["train", "{recipe}", "data.directory=none", "training.output_dir=x"], "basic_train.tsv does not exist"),
        (["train", "{recipe}", "data={{}}"], "data.directory is missing"),
        (["train", "{recipe}", "training.output_dir={recipe}"], "File exists: "),
        (["train", "{recipe}", "training.output_dir=x", "training.eval_strategy=never"], "training.eval_strategy is "),
        (["train", "{recipe}", "training.output_dir={output}/x", "training.report_to=nonsense"], "training: "),
        (["train", "{recipe}", "training.resume_from_checkpoint=none"], "expected a checkpoint's folder"),
        (
            ["train", "{recipe}", "training.resume_from_checkpoint={output}"],
            "expected a folder named checkpoint-<step>",
        ),
        (["train", "{output}"], "is not a file, expected a recipe"),
        (["evaluate", "{output}", "model.window=[1,1]"], "model.window is fixed by the run"),
        (["evaluate", "{output}", "training.output_dir=x"], "training.output_dir is fixed by the run"),
        (["evaluate", "nowhere"], "nowhere holds no recipe.yaml, expected the output_dir of `spade-ext train`"),
        (["evaluate", "{output}", "--split", "dev"], "split is 'dev', expected one of train, validation, test"),
    ],
)
def test_what_a_user_gets_wrong_is_one_sentence(run, capsys, arguments, message):
    recipe, output = run
    assert main([text.format(recipe=recipe, output=output) for text in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("spade-ext: ") and error.count("\n") == 1
