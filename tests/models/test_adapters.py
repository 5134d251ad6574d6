"""LoRA by peft on the Linears of every kind of layer."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model

from spade_ext.models import SpadeForCausalLM, SpadeForSequenceClassification
from spade_ext.models.modeling_spade import SpadeLayer

from .test_common import MODELS, all_models, batch, build, inputs_of, labels_of

ATTENTION, MEGA, SSM = ("qkv", "q", "kv", "o"), ("v_proj", "mx_proj", "h_proj"), ("output",)
TARGETS = (*ATTENTION, *MEGA, *SSM, "aggregate", "fc1", "fc2")
TASKS = {SpadeForCausalLM: TaskType.CAUSAL_LM, SpadeForSequenceClassification: TaskType.SEQ_CLS}


def adapted(model):
    config = LoraConfig(task_type=TASKS.get(type(model)), target_modules=list(TARGETS), r=4)
    return get_peft_model(copy.deepcopy(model), config)


@all_models
def test_adapters_train_are_saved_loaded_and_merged(name, tmp_path):
    base, ids = build(name).eval(), batch()
    model, inputs = adapted(base), inputs_of(base, ids)
    before = base(**inputs).logits
    torch.testing.assert_close(model.eval()(**inputs).logits, before)  # LoRA starts at 0
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(p.numel() for p in trained) < sum(p.numel() for p in model.parameters()) / 2
    optimizer = torch.optim.Adam(trained, lr=0.01)
    labels = labels_of(base, ids)
    losses = []
    for _ in range(8):
        loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    expected = model(**inputs).logits
    assert not torch.allclose(expected, before, atol=1e-3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(loaded(**inputs).logits, expected)
    merged = loaded.merge_and_unload()
    assert type(merged) is type(base)
    torch.testing.assert_close(merged(**inputs).logits, expected)


@pytest.mark.parametrize("name", MODELS)
def test_every_linear_of_a_layer_is_adapted(name):
    model = adapted(build(name)).get_base_model()
    layers = [module for module in model.modules() if isinstance(module, SpadeLayer)]
    linears = {
        path.rpartition(".")[2]
        for layer in layers
        for path, module in layer.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert linears == {"base_layer", "default"}  # the frozen weights and the two factors of the adapter
