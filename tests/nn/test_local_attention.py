import pytest
import torch

from spade_ext import nn
from spade_ext.nn.position import relative_position_buckets


@pytest.mark.parametrize(
    "name",
    [
        "local_attention_L33_R7_h2_d16_causal0_bias0_pad1",
        "local_attention_L50_R7_h2_d16_causal1_bias1_pad0",
        "local_attention_L64_R15_h4_d32_causal0_bias1_pad1",
    ],
)
def test_layer_is_the_published_one(name, load_golden):
    tensors, config = load_golden(name)
    radius = config["local_radius"]
    has_bias = "state.relative_attention_bias.weight" in tensors
    layer = nn.LocalAttention(
        config["d_model"],
        config["heads"],
        window=(radius, 0 if config["causal"] else radius),
        position="t5" if has_bias else None,
        num_buckets=config["num_buckets"],
        max_distance=config["max_distance"],
    ).double()
    names = {f"{letter}.weight": f"{letter}.weight" for letter in "qkvo"}
    if has_bias:
        names["position.weight"] = "relative_attention_bias.weight"
    layer.load_state_dict({ours: tensors[f"state.{theirs}"] for ours, theirs in names.items()})

    keep = tensors["keep"]  # (B, L)
    x = tensors["x"].transpose(0, 1).requires_grad_()
    y = layer(x, keep)
    y.backward(tensors["g"].transpose(0, 1) * keep[..., None])
    torch.testing.assert_close(y[keep], tensors["y"].transpose(0, 1)[keep], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x.grad, tensors["grad_x"].transpose(0, 1), rtol=1e-9, atol=1e-9)
    for ours, theirs in names.items():
        grad = layer.get_parameter(ours).grad
        torch.testing.assert_close(grad, tensors[f"grad.{theirs}"], rtol=1e-9, atol=1e-9)


def test_buckets_are_exact_when_near_and_shared_when_far():
    offsets = torch.tensor([0, -1, -7, -8, -16, -127, -128, -5000, 1, 7, 8, 128, 5000])
    buckets = relative_position_buckets(offsets, bidirectional=True, num_buckets=32, max_distance=128)
    assert buckets.tolist() == [0, 1, 7, 8, 10, 15, 15, 15, 17, 23, 24, 31, 31]
    one_sided = relative_position_buckets(offsets, bidirectional=False, num_buckets=32, max_distance=128)
    assert one_sided.tolist() == [0, 1, 7, 8, 16, 31, 31, 31, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("window", [(3, 0), (3, 2), (0, 0), (300, 200)])
def test_position_bias_table_has_an_entry_an_offset(window):
    position = nn.RelativePositionBias(2)
    left, right = window
    table = position(left, right)
    assert table.shape == (2, left + right + 1)
    buckets = relative_position_buckets(
        torch.arange(-left, right + 1), bidirectional=right > 0, num_buckets=32, max_distance=128
    )
    assert torch.equal(table, position.weight[buckets].T)


@pytest.mark.parametrize("window", [(3, 0), (2, 4)])
def test_padding_is_invisible(window):
    layer = nn.LocalAttention(8, 2, window=window).double()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    alone = layer(x)
    garbage = torch.full((2, 4, 8), torch.nan, dtype=torch.float64)
    mask = torch.tensor([[1] * 9 + [0] * 4] * 2)
    torch.testing.assert_close(layer(torch.cat([x, garbage], 1), mask)[:, :9], alone)
    torch.testing.assert_close(layer(torch.cat([garbage, x], 1), mask.flip(1))[:, 4:], alone)


def test_a_token_reaches_exactly_its_window():
    layer = nn.LocalAttention(8, 2, window=(2, 1))
    x = torch.randn(1, 10, 8, requires_grad=True)
    layer(x)[0, 5].sum().backward()
    reached = x.grad[0].abs().sum(-1) > 0
    assert reached.nonzero().flatten().tolist() == [3, 4, 5, 6]


def test_a_shared_table_replaces_the_own_one():
    first, second = (nn.LocalAttention(8, 2, window=(2, 2)) for _ in range(2))
    x = torch.randn(1, 6, 8)
    shared = first.position_bias()
    assert not torch.equal(second(x), second(x, position_bias=shared))
    second.position.weight.data.copy_(first.position.weight)
    assert torch.equal(second(x), second(x, position_bias=shared))


def test_half_precision_module():
    layer = nn.LocalAttention(8, 2, window=(2, 2)).bfloat16()
    assert layer(torch.randn(1, 6, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_heads": 3}, r"n_heads is 3, expected a divisor of d_model = 8"),
        ({"window": (1,)}, r"window is \(1,\), expected \(left, right\), both ints of 0 or more"),
        ({"window": (-1, 0)}, r"window is \(-1, 0\), expected \(left, right\), both ints of 0 or more"),
        ({"window": (1.5, 0)}, r"window is \(1.5, 0\), expected \(left, right\), both ints of 0 or more"),
        ({"position": "rope"}, r"position is 'rope', expected 't5' or None"),
        ({"num_buckets": 5}, r"num_buckets is 5, expected an even number of at least 4"),
        ({"max_distance": 16}, r"max_distance is 16, expected at least num_buckets = 32"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        nn.LocalAttention(**{"d_model": 8, "n_heads": 2, "window": (2, 2), **options})
