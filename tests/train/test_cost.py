from math import log2
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_outputs import SequenceClassifierOutput

import spade_ext
from spade_ext.cli import main
from spade_ext.models import SpadeConfig, SpadeForSequenceClassification
from spade_ext.nn import LocalAttention
from spade_ext.train import Recipe, cost

RECIPES = Path(__file__).parents[2] / "recipes"
B, L = 3, 50


def model(**options):
    sizes = {"vocab_size": 16, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    return SpadeForSequenceClassification(
        SpadeConfig(
            **{**sizes, "intermediate_size": 40, "window": (5, 3), "ssm_d_state": 8, "ssm_layers": (0, 2), **options}
        )
    )


def inputs(device="cpu"):
    tokens = torch.ones(B, L, dtype=torch.int64)
    mask, labels = torch.ones(B, L, dtype=torch.bool), torch.zeros(B, dtype=torch.int64)
    return {
        name: tensor.to(device)
        for name, tensor in {"input_ids": tokens, "attention_mask": mask, "labels": labels}.items()
    }


@pytest.fixture(scope="module")
def measured():
    with torch.device("meta"):
        module = model()
    return cost.step_cost(module, inputs("meta"))


def test_operations_are_those_that_torch_counts(measured):
    module = model()
    with FlopCounterMode(display=False) as forward:
        loss = module(**inputs()).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert sum(measured.forward.values()) == forward.get_total_flops()
    assert sum(measured.backward.values()) == backward.get_total_flops()


def test_products_are_those_of_the_linears(measured):
    linears = [module for module in model().modules() if isinstance(module, nn.Linear)]
    per_token = sum(2 * linear.in_features * linear.out_features for linear in linears[:-2])
    per_sequence = sum(2 * linear.in_features * linear.out_features for linear in linears[-2:])
    pooling = 2 * L * 24
    assert measured.forward["linear"] == B * (L * per_token + per_sequence + pooling)
    # Each again for the gradients of inputs and weights; pooling's weights have none.
    assert measured.backward["linear"] == B * (2 * L * per_token + 2 * per_sequence + pooling)


def test_attention_is_that_of_the_readme(measured):
    layers = [module for module in model().modules() if isinstance(module, LocalAttention)]
    pairs = B * 2 * sum(min(L, i + 4) - max(0, i - 5) for i in range(L))
    assert measured.forward["attention"] == len(layers) * pairs * (2 * 12 + 2 * 12)
    assert measured.backward["attention"] == len(layers) * pairs * (6 * 12 + 4 * 12)


@pytest.mark.parametrize(
    ("options", "pairs", "widths"),
    [
        ({"mixer": "chunk", "chunk_size": 8}, 2 * (6 * 8 * 8 + 2 * 2), (12, 12)),
        ({"mixer": "full"}, 2 * L * L, (12, 12)),
        ({"mixer": "full", "causal": True}, 2 * L * (L + 1) // 2, (12, 12)),
        ({"mixer": "mega", "position": "simple", "chunk_size": 8}, 6 * 8 * 8 + 2 * 2, (64, 40)),
    ],
    ids=["chunk", "full", "causal_full", "mega_chunk"],
)
def test_attention_of_other_mixers(options, pairs, widths):
    with torch.device("meta"):
        measured = cost.step_cost(model(**{"window": None, **options}), inputs("meta"))
    (D, Dv), layers = widths, 3
    assert measured.forward["attention"] == layers * B * pairs * (2 * D + 2 * Dv)
    assert measured.backward["attention"] == layers * B * pairs * (6 * D + 4 * Dv)


@pytest.mark.parametrize(
    ("options", "kernel", "kernel_backward"),
    [
        ({"ssm_kind": "s4d"}, 4 * 2 * L, 8 * 2 * L),
        ({"ssm_l_max": 64}, 31 * 64, 90 * 64),  # R = M = 1, C = 2 for two sides: 6 Cauchy sums
        ({"ssm_l_max": 30}, 31 * 60, 90 * 60),  # 1.5 nodes for each of the 20 taps beyond 30
    ],
    ids=["s4d", "s4", "s4_beyond_l_max"],
)
def test_state_space_models_are_those_of_the_readmes(options, kernel, kernel_backward):
    with torch.device("meta"):
        measured = cost.step_cost(model(**options), inputs("meta"))
    layers, H, N, n = 2, 24, 4, 128  # the transform's length: at least 50 + 49, and 3 * 32, 5 * 16 are less
    transform = 2.5 * n * log2(n)
    convolution = H * ((B + 1 + B) * transform + 3 * n * B)
    assert measured.forward["ssm"] == pytest.approx(layers * (H * N * kernel + convolution))
    convolution = H * ((2 * B + 2 + B) * transform + 6 * n * B)
    assert measured.backward["ssm"] == pytest.approx(layers * (H * N * kernel_backward + convolution))


def test_a_scan_is_that_of_the_readme(monkeypatch):
    monkeypatch.setattr(spade_ext.nn.state_space, "SCAN_LIMIT", 16)
    with torch.device("meta"):
        measured = cost.step_cost(model(ssm_kind="ema"), inputs("meta"))
    tokens, N = 2 * 2 * B * L * 24, 8  # of two layers in two directions
    assert measured.forward["ssm"] == tokens * (4 * N + 18)
    assert measured.backward["ssm"] == tokens * (12 * N + 38)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_model_without_memory_costs_what_a_real_one_does(dropout):
    with torch.device("meta"):
        module = model(dropout=dropout)
    assert cost.step_cost(module, inputs("meta")) == cost.step_cost(model(dropout=dropout), inputs())


def test_activations():
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(10, 20), nn.Linear(20, 30)

        def forward(self, x):
            hidden = self.first(x).relu()  # x and the result of relu, once, are kept
            return SequenceClassifierOutput(loss=self.second(hidden).sum())

    assert cost.step_cost(Module(), {"x": torch.zeros(7, 10)}).activations == 4 * 7 * (10 + 20)


def test_training_memory():
    module = nn.ModuleList([nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False)])
    module[0].bias.requires_grad_(False)
    buffers = 4 * (4 + 4) + 8
    assert cost.training_memory(module) == 4 * (4 * 12 + 4) + buffers


@pytest.mark.parametrize(
    ("name", "lengths"),
    [("quickstart/listops", [100, 256, 1024, 4096, 16384]), ("quickstart/image", [256, 1024, 4096, 16384])],
)
def test_info(capsys, name, lengths):
    path, override = RECIPES / f"{name}.yaml", "model.hidden_size=16"
    assert main(["info", str(path), override]) == 0
    printed = capsys.readouterr().out
    recipe = Recipe.load(path, [override])
    module = SpadeForSequenceClassification(recipe.model_config())
    assert f"parameters: {sum(parameter.numel() for parameter in module.parameters()):,}\n" in printed
    rows = [line.replace(",", "").split() for line in printed.splitlines()[-len(lengths) :]]
    assert [int(row[0]) for row in rows] == lengths
    batch = recipe.training["per_device_train_batch_size"]
    for row, expected in zip(rows, cost.recipe_costs(recipe, lengths)[1].values(), strict=True):
        forward, backward = sum(expected.forward.values()), sum(expected.backward.values())
        assert float(row[1]) == pytest.approx(forward / batch / 1e9, abs=1e-3)
        assert float(row[2]) == pytest.approx((forward + backward) / batch / 1e9, abs=1e-3)
        assert float(row[6]) == pytest.approx(expected.activations / 1e6, abs=1)
