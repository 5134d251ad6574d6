import re
from pathlib import Path

import pytest

from spade_ext.train import Recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_recipe_can_be_built_and_says_what_it_costs(path):
    recipe = Recipe.load(path, ["training.use_cpu=true", "training.bf16=false"])
    recipe.make_task(), recipe.model_config(), recipe.training_arguments()
    header = "".join(re.findall(r"^#(.*\n)", path.read_text(), re.MULTILINE))
    for word in ("Launch:", "Hardware:", "Time:", "Metric:"):
        assert word in header, f"{path} does not say {word}"
    placeholder = re.search(r"(Time|Metric):\s*(TIME|METRIC)\b", header)
    assert not placeholder, f"{path} still holds the placeholder {placeholder[2]}"
