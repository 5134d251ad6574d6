import pytest
import torch
from torch import nn
from torch.nn.functional import linear as reference
from torch.testing import assert_close

from spade_ext.nn import Linear
from spade_ext.nn.linear import ROWS_LIMIT, linear


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts calls of `linear_step`."""

    steps = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.steps += function is torch.ops.spade_ext.linear_step.default
        return function(*args, **(kwargs or {}))


def steps(*arguments):
    with Calls() as calls:
        y = linear(*arguments)
    assert_close(y, reference(*arguments))
    return calls.steps


@pytest.mark.parametrize("dtype", ROWS_LIMIT, ids=str)
@torch.no_grad()
def test_few_rows_are_steps(dtype):
    weight, bias, most = torch.randn(5, 7, dtype=dtype), torch.randn(5, dtype=dtype), ROWS_LIMIT[dtype]
    for shape in ((7,), (1, 7), (most, 7), (most, 1, 7), (0, 7)):
        assert steps(torch.randn(shape, dtype=dtype), weight, bias) == 1
    assert steps(torch.randn(most + 1, 7, dtype=dtype), weight, bias) == 0


def test_all_else_is_torchs():
    x, weight = torch.randn(1, 7), torch.randn(5, 7)
    assert steps(x, weight) == 0  # gradients are recorded
    with torch.no_grad():
        assert steps(x, torch.randn(7, 5).mT) == 0
        with torch.autocast("cpu", torch.bfloat16):
            assert steps(x, weight) == 0


class Doubled(torch.Tensor):
    """A weight whose class says what a Linear of it is, as quantized ones do."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            y = function(*args, **(kwargs or {}))
        return 2 * y if function is torch.nn.functional.linear else y


@torch.no_grad()
def test_classes_of_weights_are_left_to_torch():
    x, weight = torch.randn(1, 7), torch.randn(5, 7)
    assert_close(linear(x, weight.as_subclass(Doubled)), 2 * reference(x, weight))


def test_compiled_code_takes_torchs():
    layer = Linear(7, 5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        x = torch.randn(1, 7)
        assert_close(compiled(x), reference(x, layer.weight, layer.bias))


def test_is_a_linear():
    torch.manual_seed(0)
    ours = Linear(7, 5)
    torch.manual_seed(0)
    theirs = nn.Linear(7, 5)
    assert isinstance(ours, nn.Linear) and repr(ours) == repr(theirs)
    for (name, a), (expected, b) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert name == expected and torch.equal(a, b)
    x = torch.randn(3, 7, requires_grad=True)
    ours(x).sum().backward()
    assert ours.weight.grad is not None
