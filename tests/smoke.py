"""`python smoke.py CALLS RESULTS`: runs ops in a process of its own, as another CPU may.

CALLS is a list of (op, args, kwargs) that torch.save wrote. RESULTS gets, for each call, its outputs, the gradients of
its arguments that require one, and its arguments as they are afterwards.
"""

import sys

import torch

from spade_ext import ops


def run(op: str, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    output = getattr(ops, op)(*args, **kwargs)
    outputs = output if isinstance(output, tuple) else (output,)
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    gradients = []
    if leaves and any(y.requires_grad for y in outputs):
        gradients = torch.autograd.grad(sum(y.square().sum() for y in outputs), leaves, allow_unused=True)
    return [t.detach() for t in (*outputs, *gradients, *tensors) if t is not None]


if __name__ == "__main__":
    print(torch.backends.cpu.get_cpu_capability())
    calls, results = sys.argv[1:]
    torch.save([run(*call) for call in torch.load(calls)], results)
