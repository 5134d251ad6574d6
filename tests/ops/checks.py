"""What every op has to pass, whatever it computes."""

from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch.testing import assert_close

from spade_ext.ops import long_conv

from .sample_inputs import Sample, leaf

TOLERANCES = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-9},
    torch.float32: {"rtol": 1e-5, "atol": 2e-5},
    torch.float16: {"rtol": 4e-3, "atol": 4e-3},
    torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2},
}

OPCHECK_TESTS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_static",
    "test_aot_dispatch_dynamic",
)


def call(op, sample: Sample) -> list[torch.Tensor]:
    """All outputs of an op that has one or several."""
    outputs = op(*sample.args, **sample.kwargs)
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def run(op, sample: Sample, rounded: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """The outputs, and the gradient of each tensor that has one under cotangents that are the same in every run.

    The cotangents' numbers are those of `rounded` or of the output's type, whichever is coarser.
    """
    outputs, generator = call(op, sample), torch.Generator().manual_seed(1)
    if not sample.leaves():
        return outputs
    cotangents = [
        torch.randn(y.shape, dtype=torch.float64, generator=generator).to(rounded).to(y.dtype) for y in outputs
    ]
    pairs = [(y, cotangent) for y, cotangent in zip(outputs, cotangents, strict=True) if y.requires_grad]
    differentiable, cotangents = zip(*pairs, strict=True)
    return [*outputs, *torch.autograd.grad(differentiable, sample.leaves(), cotangents, materialize_grads=True)]


def check_against_reference(op, reference, sample: Sample, dtype: torch.dtype) -> None:
    """Both get the same numbers, rounded to dtype; the reference computes in float64."""
    sample = sample.to(dtype)
    for actual, expected in zip(run(op, sample), run(reference, sample.to(torch.float64), dtype), strict=True):
        assert_close(actual, expected.to(dtype), **TOLERANCES[dtype])


def check_opcheck(op, args: tuple, kwargs: dict | None = None) -> None:
    torch.library.opcheck(op, args, kwargs, test_utils=OPCHECK_TESTS)


def check_gradients(op, sample: Sample) -> None:
    """gradcheck of the tensors that have a gradient."""

    def function(*leaves):
        values = iter(leaves)
        filled = sample.map(lambda t: next(values) if t.requires_grad else t)
        return op(*filled.args, **filled.kwargs)

    assert torch.autograd.gradcheck(function, sample.leaves())


def check_refuses_second_derivative(op, sample: Sample, name: str) -> None:
    loss = sum(y.square().sum() for y in call(op, sample))
    gradients = torch.autograd.grad(loss, sample.leaves(), create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name}_backward is not implemented"):
        gradients[0].sum().backward()


def check_compiles_once(op, samples: list[Sample], backend: str) -> None:
    """One graph serves all samples, forward and backward."""
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend=backend)
    for sample in samples:
        for actual, expected in zip(run(compiled, sample), run(op, sample), strict=True):
            assert_close(actual, expected, **TOLERANCES[expected.dtype])
    assert counters["stats"]["unique_graphs"] == 1


def check_same_bits(op, sample: Sample, set_threads) -> None:
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        results.append(run(op, sample))
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


def golden_parameters(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By name, those of a golden file's state that it has gradients of."""
    names = [key.removeprefix("grad.") for key in tensors if key.startswith("grad.")]
    return {name: leaf(tensors[f"state.{name}"]) for name in names}


def check_golden(
    tensors: dict[str, torch.Tensor], parameters: dict[str, torch.Tensor], k: torch.Tensor, skip: torch.Tensor
) -> None:
    """Kernel, output and all gradients of a published layer; its second kernel, where it has one, is the reverse."""
    u = leaf(tensors["u"])
    y = long_conv(u, k[:1], skip, k[1:] if k.size(0) == 2 else None).squeeze(1)
    gradients = torch.autograd.grad(y, [u, *parameters.values()], tensors["g"])
    if "kernel" in tensors:
        assert_close(k, tensors["kernel"], **TOLERANCES[torch.float64])
    assert_close(y, tensors["y"], **TOLERANCES[torch.float64])
    for name, gradient in zip(["grad_u", *(f"grad.{name}" for name in parameters)], gradients, strict=True):
        assert_close(
            gradient, tensors[name], **TOLERANCES[torch.float64], msg=lambda text, name=name: f"{name}: {text}"
        )


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """In norm; an expected zero must be met exactly."""
    difference = (actual.double() - expected).norm() / expected.norm().clamp(min=1e-300)
    return difference.item()


def relative_errors(op, reference, sample: Sample, dtype: torch.dtype) -> list[float]:
    """The errors of op in dtype against the reference in float64, from the same numbers rounded to dtype."""
    sample = sample.to(dtype)
    return list(map(relative_error, run(op, sample), run(reference, sample.to(torch.float64), dtype)))


def peak_memory(call) -> int:
    """How far, in bytes, `call` raises the memory of this process."""

    def status(key: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is in use
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


def peak_allocation(call) -> int:
    """The most bytes that torch's allocator held at a time for `call`, on this thread, beyond what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(sizes, initial=0))
