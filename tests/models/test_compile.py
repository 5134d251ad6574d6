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
    "scanned_s4d_alone": (SpadeForCausalLM, {"mixer": "ssm", "causal": True, "ssm_kind": "s4d"}),
    "ema_window": (SpadeForCausalLM, {**CAUSAL, "position": "learned", "ssm_kind": "ema", "ssm_combine": "add"}),
    "adaptive": (SpadeForCausalLM, {**CAUSAL, "position": "sinusoidal", "adaptive_cutoffs": (4, 9)}),
    "s4_chunk": (SpadeForMaskedLM, {"mixer": "chunk", "chunk_size": 4, "position": "alibi"}),
    "long_ema_window": (SpadeForMaskedLM, {"window": (3, 3), "ssm_kind": "ema", "ssm_d_state": 20}),
    "ema_mega_full": (SpadeForMaskedLM, {**MEGA, "position": "simple", "ssm_kind": "ema"}),
    "s4_mega_window": (SpadeForSequenceClassification, {**MEGA, "window": (3, 3)}),
    "s4d_full": (SpadeForSequenceClassification, {"mixer": "full", "ssm_kind": "s4d", "pooling": "last"}),
    "s4_alone": (SpadeForSequenceClassification, {"mixer": "ssm", "norm": "rmsnorm"}),
}


def build(name):
    cls, options = MODELS[name]
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3}
    return cls(SpadeConfig(**{**sizes, "intermediate_size": 32, "ssm_d_state": 8, "adaptive_factor": 2, **options}))


def inputs(model, B, L, kind):
    ids = torch.randint(1, 20, (B, L))
    classifies = isinstance(model, SpadeForSequenceClassification)
    given = {"input_ids": ids, "labels": ids[:, 0] % 3 if classifies else ids}
    if kind == "masked":
        given["attention_mask"] = (torch.arange(L) >= torch.arange(B)[:, None]).long()
    if kind == "packed":
        given["position_ids"] = torch.arange(L).expand(B, L) % (L // 2 + 1)
    return given


def check_training(model, kind, backend, sizes):
    """The loss and all gradients are those without torch.compile; one graph serves all sizes."""
    torch._dynamo.reset()
    expected_model = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for B, L in sizes:
            given = inputs(model, B, L, kind)
            loss, expected = compiled(**given).loss, expected_model(**given).loss
            torch.testing.assert_close(loss, expected)
            loss.backward()
            expected.backward()
    for (name, parameter), expected in zip(model.named_parameters(), expected_model.parameters(), strict=True):
        torch.testing.assert_close(
            parameter.grad, expected.grad, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("kind", ["plain", "masked", "packed"])
@pytest.mark.parametrize("name", MODELS)
def test_training_is_one_graph(name, kind):
    model = build(name).train()
    for module in model.modules():  # random numbers are drawn in another order
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if kind == "packed" and isinstance(model, SpadeForSequenceClassification):
        pytest.skip("a row is classified as one document")
    check_training(model, kind, "aot_eager", [(2, 12), (3, 17), (4, 129)])
