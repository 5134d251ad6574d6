"""`python export_model.py MODEL EXPECTED`: compiles a SPADE language model for run_model.cpp, with what it computes."""

import sys

import torch

from spade_ext.models import SpadeConfig, SpadeForCausalLM

torch.manual_seed(0)
config = SpadeConfig(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    window=(8, 0),
    ssm_d_state=16,
    ssm_l_max=64,
)
model = SpadeForCausalLM(config).eval()


def inputs(batch_size: int, length: int) -> dict[str, torch.Tensor]:
    """Rows padded on the left, each by one token more than the row before."""
    shape = batch_size, length
    return {
        "input_ids": torch.randint(1, config.vocab_size, shape),
        "attention_mask": (torch.arange(length) >= torch.arange(batch_size)[:, None]).long(),
    }


sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
with torch.no_grad():
    program = torch.export.export(
        model, (), inputs(2, 20), dynamic_shapes={"input_ids": sizes, "attention_mask": sizes}
    )
    torch._inductor.aoti_compile_and_package(program, package_path=sys.argv[1])
    expected = []
    for example in (inputs(2, 20), inputs(3, 129), inputs(1, 1)):
        expected.append((*example.values(), model(**example).logits))
torch.save(expected, sys.argv[2])
