"""Two processes that train one model, by DDP and by FSDP2, against one process with the whole batch."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel

from .test_common import MODELS, all_models, batch, build, labels_of

FULL = StateDictOptions(full_state_dict=True)


def in_two_processes(work, tmp_path, *args):
    """work(rank, *args) in each, in a group of both."""
    start_processes(_join, (work, f"file://{tmp_path}/group", args), nprocs=2, start_method="fork")


def _join(rank, work, init_method, args):
    dist.init_process_group("gloo", init_method, rank=rank, world_size=2)
    work(rank, *args)
    dist.destroy_process_group()


def shard(model):
    for module in reversed(list(model.modules())):  # inner ones first
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module)
    return fully_shard(model)


def shard_as_the_trainer(model):
    """accelerate's FSDP2 has no device type for CPUs, but its function works there."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    state = SimpleNamespace(fsdp_plugin=plugin)
    return fsdp2_prepare_model(SimpleNamespace(state=state, mixed_precision="no", is_main_process=True), model)


def build_without_dropout(name):
    model = build(name).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model


def train(model, ids, labels, steps=2):
    """Steps on the mean of the losses of both halves of the batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        losses = [model(*half[:1], labels=half[1]).loss for half in zip(ids, labels, strict=True)]
        (sum(losses) / len(losses)).backward()
        optimizer.step()
        optimizer.zero_grad()


def check_state(actual, expected, **tolerance):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def ddp(rank, model, ids, labels):
    alone = copy.deepcopy(model)
    wrapped = DistributedDataParallel(model)  # refuses parameters without gradients at the second step
    train(wrapped, ids[rank : rank + 1], labels[rank : rank + 1])
    train(alone, ids, labels)
    check_state(model.state_dict(), alone.state_dict(), rtol=1e-4, atol=1e-6)


@all_models
def test_ddp_has_no_unused_parameters(name, tmp_path):
    model, ids = build_without_dropout(name), batch(4)
    in_two_processes(ddp, tmp_path, model, ids.split(2), labels_of(model, ids).split(2))


def fsdp(rank, shard, model, ids, labels):
    alone, again = copy.deepcopy(model), copy.deepcopy(model)
    shard(model)
    train(model, ids[rank : rank + 1], labels[rank : rank + 1])
    train(alone, ids, labels)
    state = get_model_state_dict(model, options=FULL)
    half = model.dtype == torch.bfloat16
    if rank == 0:  # the others have none
        check_state(state, alone.state_dict(), rtol=0.02 if half else 1e-4, atol=0.01 if half else 1e-6)
    shard(again)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(again, state, options=options)
    check_state(get_model_state_dict(again), get_model_state_dict(model), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "dtype", "shard"),
    [
        *((name, torch.float32, shard) for name in MODELS),
        *((name, torch.bfloat16, shard) for name in ("causal_lm", "mega_lm")),
        *((name, torch.bfloat16, shard_as_the_trainer) for name in ("causal_lm", "full_classifier")),
    ],
)
def test_fsdp(name, dtype, shard, tmp_path):
    """Of a bfloat16 model the state space layers, which are float32, are sharded apart."""
    model, ids = build_without_dropout(name).to(dtype), batch(4)
    in_two_processes(fsdp, tmp_path, shard, model, ids.split(2), labels_of(model, ids).split(2))
