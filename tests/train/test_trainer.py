import torch
from torch import nn

from spade_ext.models import SpadeConfig, SpadeForSequenceClassification
from spade_ext.train import parameter_groups


def model(**options):
    sizes = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return SpadeForSequenceClassification(
        SpadeConfig(**sizes, intermediate_size=32, window=(3, 3), ssm_d_state=8, **options)
    )


def options_by_name(module, groups):
    names = {parameter: name for name, parameter in module.named_parameters()}
    return {
        names[parameter]: {key: value for key, value in group.items() if key != "params"}
        for group in groups
        for parameter in group["params"]
    }


def test_each_parameter_is_in_one_group():
    module = model()
    groups = parameter_groups(module, weight_decay=0.1)
    members = [parameter for group in groups for parameter in group["params"]]
    assert len(members) == len(set(members)) == len(list(module.parameters()))


def test_options_of_parameters():
    module = model(ssm_lr=1e-4)
    options = options_by_name(module, parameter_groups(module, weight_decay=0.1))
    layer = "model.layers.0."
    assert options[f"{layer}mixer.attention.qkv.weight"] == {"weight_decay": 0.1}
    assert options[f"{layer}mixer.ssm.C"] == {"weight_decay": 0.1}
    assert options[f"{layer}mixer.ssm.B"] == {"weight_decay": 0.0, "lr": 1e-4}
    assert options[f"{layer}mixer.ssm.log_dt"] == {"weight_decay": 0.0}
    assert options[f"{layer}mixer_norm.weight"] == {"weight_decay": 0.0}
    assert options[f"{layer}feed_forward.fc1.bias"] == {"weight_decay": 0.0}
    assert options[f"{layer}mixer.attention.position.weight"] == {"weight_decay": 0.0}


def test_frozen_and_shared_parameters():
    module = model()
    module.model.embed_tokens.weight.requires_grad_(False)
    module.model.layers[1].feed_forward.fc1.weight = module.model.layers[0].feed_forward.fc1.weight
    members = [parameter for group in parameter_groups(module, 0.1) for parameter in group["params"]]
    assert sum(parameter is module.model.embed_tokens.weight for parameter in members) == 0
    assert sum(parameter is module.model.layers[0].feed_forward.fc1.weight for parameter in members) == 1


def test_a_parameter_of_two_modules_is_in_the_group_of_the_first():
    module = nn.ModuleList([nn.LayerNorm(4), nn.Linear(4, 4)])
    module[1].weight = module[0].weight
    groups = parameter_groups(module, weight_decay=0.1)
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0.0, 3)]


def test_the_schedule_scales_each_group_from_its_own_rate():
    module = model(ssm_lr=1e-4)
    optimizer = torch.optim.AdamW(parameter_groups(module, 0.1), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == [5e-5, 5e-3]
    assert schedule.get_last_lr()
