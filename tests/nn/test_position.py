import math

import pytest
import torch

from spade_ext import nn
from spade_ext.nn import AlibiBias, RotaryBias, SimpleBias
from spade_ext.nn.position import build_position_bias, relative_position_buckets

WINDOWS = [(3, 0), (3, 2), (0, 0), (0, 5), (300, 200)]
BIASES = {
    "t5": lambda: nn.RelativePositionBias(4),
    "alibi": lambda: AlibiBias(4),
    "simple": lambda: SimpleBias(4, 301),
    "rotary": lambda: RotaryBias(4, 6),
}


def test_buckets_are_exact_when_near_and_shared_when_far():
    offsets = torch.tensor([0, -1, -7, -8, -16, -127, -128, -5000, 1, 7, 8, 128, 5000])
    buckets = relative_position_buckets(offsets, bidirectional=True, num_buckets=32, max_distance=128)
    assert buckets.tolist() == [0, 1, 7, 8, 10, 15, 15, 15, 17, 23, 24, 31, 31]
    one_sided = relative_position_buckets(offsets, bidirectional=False, num_buckets=32, max_distance=128)
    assert one_sided.tolist() == [0, 1, 7, 8, 16, 31, 31, 31, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("window", WINDOWS)
def test_position_bias_table_has_an_entry_an_offset(window):
    position = nn.RelativePositionBias(2)
    left, right = window
    table = position(left, right)
    assert table.shape == (2, left + right + 1)
    buckets = relative_position_buckets(
        torch.arange(-left, right + 1), bidirectional=right > 0, num_buckets=32, max_distance=128
    )
    assert torch.equal(table, position.weight[buckets].T)


@pytest.mark.parametrize(
    ("n_heads", "exponents"),
    [
        (1, [8]),
        (2, [4, 8]),
        (8, [1, 2, 3, 4, 5, 6, 7, 8]),
        (12, [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5]),
        (16, [0.5 * h for h in range(1, 17)]),
    ],
)
def test_alibi_falls_by_the_published_slopes(n_heads, exponents):
    table = AlibiBias(n_heads).double()(3, 2)
    slopes = torch.tensor([2.0**-exponent for exponent in exponents], dtype=torch.float64)
    distance = torch.tensor([3.0, 2.0, 1.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(table, -slopes[:, None] * distance, rtol=1e-15, atol=0)


def test_alibi_has_nothing_to_learn_or_to_save():
    position = AlibiBias(4)
    assert not list(position.parameters()) and not position.state_dict()


def test_simple_bias_has_a_number_an_offset():
    position = SimpleBias(2, 8)
    for r in range(-3, 3):
        assert torch.equal(position(3, 2)[:, 3 + r], position.weight[:, 7 + r])
    assert torch.equal(position(7, 7), position.weight)


def rotated(x, t):
    """x (H, dim) as dim / 2 complex numbers, halves real and imaginary, turned by t of their angles."""
    half = x.size(-1) // 2
    angles = torch.tensor([t * math.exp(-math.log(10000) * m / half) for m in range(half)], dtype=torch.float64)
    z = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([z.real, z.imag], dim=-1)


@pytest.mark.parametrize("window", [(4, 4), (2, 3)])
def test_rotary_bias_is_the_product_of_rotated_vectors(window):
    position = RotaryBias(3, 10).double()
    left, right = window
    table = position(left, right)
    for i in range(5):
        for j in range(5):
            if -left <= j - i <= right:
                product = (rotated(position.alpha, i) * rotated(position.beta, j)).sum(-1)
                torch.testing.assert_close(table[:, left + j - i], product, rtol=1e-12, atol=1e-16)


def test_far_rotary_angles_are_exact_in_float32():
    """An angle of 1e5 radians has an error of 4e-3 in float32."""
    position = RotaryBias(1, 4)
    with torch.no_grad():
        position.alpha.fill_(1)
        position.beta.fill_(1)
    r = 100_000
    expected = 2 * math.cos(r) + 2 * math.cos(r / 100)
    torch.testing.assert_close(position(r, 0)[0, 0].item(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", BIASES)
def test_shapes_and_dtypes(name, window):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        table = BIASES[name]().to(dtype)(*window)
        assert table.shape == (4, sum(window) + 1) and table.dtype == dtype and table.isfinite().all()


@pytest.mark.parametrize("name", ["t5", "simple", "rotary"])
def test_gradients_reach_every_parameter_and_none_decays(name):
    position = BIASES[name]().double()
    position(300, 300).mul(torch.randn(4, 601, dtype=torch.float64)).sum().backward()
    for parameter in position.parameters():
        assert parameter.grad.isfinite().all() and (parameter.grad != 0).float().mean() > 0.9
    names = {name for name, _ in position.named_parameters()}
    assert position.parameter_options() == {name: {"weight_decay": 0.0} for name in names}


def test_gradcheck_of_the_rotary_bias():
    position = RotaryBias(2, 4).double()

    def table(alpha, beta):
        return torch.func.functional_call(position, {"alpha": alpha, "beta": beta}, (3, 2))

    assert torch.autograd.gradcheck(table, (position.alpha, position.beta))


@pytest.mark.parametrize("name", ["t5", "simple", "rotary"])
def test_initial_values_are_normal(name):
    position = {
        "t5": lambda: nn.RelativePositionBias(256),
        "simple": lambda: SimpleBias(16, 512),
        "rotary": lambda: RotaryBias(16, 512),
    }[name]()
    for _, parameter in position.named_parameters():
        assert abs(parameter.std() - 0.02) < 1e-3 and parameter.mean().abs() < 1e-3


@pytest.mark.parametrize("name", BIASES)
def test_a_module_made_on_meta_computes_what_one_made_on_the_cpu_does(name):
    expected = BIASES[name]()
    with torch.device("meta"):
        position = BIASES[name]()
    assert position(3, 2).is_meta and position(3, 2).shape == (4, 6)
    position.to_empty(device="cpu")
    position.reset_parameters()
    assert position(3, 2).isfinite().all()
    position.load_state_dict(expected.state_dict())
    assert torch.equal(position(3, 2), expected(3, 2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AlibiBias(0), r"n_heads is 0, expected at least 1"),
        (lambda: SimpleBias(2, 0), r"max_positions is 0, expected at least 1"),
        (lambda: SimpleBias(2, 4)(4, 0), r"a token sees others 4 tokens away, expected fewer than max_positions = 4"),
        (lambda: SimpleBias(2, 4)(0, 9), r"a token sees others 9 tokens away, expected fewer than max_positions = 4"),
        (lambda: RotaryBias(2, 5), r"dim is 5, expected an even number of at least 2"),
        (
            lambda: build_position_bias("learned", 2, max_positions=4, dim=4),
            r"position is 'learned', expected 't5', 'alibi', 'simple', 'rotary' or None",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
