"""Whole models are one graph that serves all batches and lengths, in training and in evaluation."""

import copy

import pytest
import torch

from spade_ext.models import SpadeConfig, SpadeForCausalLM, SpadeForMaskedLM, SpadeForSequenceClassification

CAUSAL = {"window": (3, 0)}
MEGA = {"mixer": "mega", "position": "rotary", "mega_z_dim": 8}
MODELS = {
    "s4_window": (SpadeForCausalLM, CAUSAL),
    "s4_stack_full": (SpadeForCausalLM, {"mixer": "full", "causal": True, "position": "rope", "ssm_combine": "stack"}),
    "s4d_mega_chunk": (SpadeForCausalLM, {**MEGA, "causal": True, "chunk_size": 4, "ssm_kind": "s4d"}),
    "scanned_ema_window": (
        SpadeForCausalLM,
        {**CAUSAL, "position": "learned", "ssm_kind": "ema", "ssm_combine": "add"},
    ),
    "adaptive": (SpadeForCausalLM, {**CAUSAL, "position": "sinusoidal", "adaptive_cutoffs": (9,)}),
    "s4_chunk": (SpadeForMaskedLM, {"mixer": "chunk", "chunk_size": 4, "position": "alibi"}),
    "ema_window": (SpadeForMaskedLM, {"window": (3, 3), "ssm_kind": "ema", "ssm_d_state": 20}),
    "ema_mega_full": (SpadeForMaskedLM, {**MEGA, "position": "simple", "ssm_kind": "ema"}),
    "s4_mega_window": (SpadeForSequenceClassification, {**MEGA, "window": (3, 3)}),
    "s4d_full": (SpadeForSequenceClassification, {"mixer": "full", "ssm_kind": "s4d", "pooling": "last"}),
    "s4d_alone": (SpadeForSequenceClassification, {"mixer": "ssm", "ssm_kind": "s4d", "norm": "rmsnorm"}),
}
SIZES = ((2, 12), (3, 129))  # (B, L)
one_graph = torch._dynamo.config.patch(error_on_recompile=True)


def build(name):
    cls, options = MODELS[name]
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 3}
    return cls(
        SpadeConfig(
            **{
                **sizes,
                "problem_type": "single_label_classification",
                "intermediate_size": 32,
                "ssm_d_state": 8,
                "adaptive_factor": 2,
                **options,
            }
        )
    )


def inputs(model, B, L, kind):
    ids = torch.randint(1, 20, (B, L))
    classifies = isinstance(model, SpadeForSequenceClassification)
    given = {"input_ids": ids, "labels": ids[:, 0] % 3 if classifies else ids}
    if kind == "masked":
        given["attention_mask"] = (torch.arange(L) >= torch.arange(B)[:, None]).long()
    if kind == "packed":
        given["position_ids"] = torch.arange(L).expand(B, L) % (L // 2 + 1)
    return given


@pytest.mark.parametrize(
    ("name", "kind", "backend"),
    [
        ("s4_window", "packed", "aot_eager"),
        ("s4_stack_full", "masked", "aot_eager"),
        ("s4d_mega_chunk", "packed", "aot_eager"),
        ("scanned_ema_window", "plain", "aot_eager"),
        ("adaptive", "masked", "aot_eager"),
        ("s4_chunk", "masked", "aot_eager"),
        ("ema_window", "packed", "aot_eager"),
        ("ema_mega_full", "plain", "aot_eager"),
        ("s4_mega_window", "masked", "aot_eager"),
        ("s4d_full", "plain", "aot_eager"),
        ("s4d_alone", "masked", "inductor"),
    ],
)
def test_training_is_one_graph(name, kind, backend):
    """The loss and all gradients are those without torch.compile."""
    torch._dynamo.reset()
    model = build(name).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # compiled code draws other numbers
    eager, compiled = copy.deepcopy(model), torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    with one_graph:
        for size in SIZES:
            given = inputs(model, *size, kind)
            for each in (compiled, eager):
                each(**given).loss.backward()
    for (name, parameter), expected in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(
            parameter.grad, expected.grad, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(
    ("name", "kind"), [("s4_window", "packed"), ("s4_chunk", "plain"), ("s4_mega_window", "masked")]
)
def test_evaluation_is_one_graph(name, kind):
    torch._dynamo.reset()
    model = build(name).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    with one_graph, torch.no_grad():
        for size in SIZES:
            given = inputs(model, *size, kind)
            actual, expected = compiled(**given), model(**given)
            torch.testing.assert_close((actual.loss, actual.logits), (expected.loss, expected.logits))
