import math
import re

import pytest
import torch

from spade_ext import nn
from spade_ext.convert import from_reference, load_reference
from spade_ext.nn.position import rotate

from ..reference import below


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
    layer = nn.LocalAttention(
        config["d_model"],
        config["heads"],
        window=(radius, 0 if config["causal"] else radius),
        position="t5" if "state.relative_attention_bias.weight" in tensors else None,
        num_buckets=config["num_buckets"],
        max_distance=config["max_distance"],
    ).double()
    load_reference(layer, below(tensors, "state."))

    keep = tensors["keep"]  # (B, L)
    x = tensors["x"].transpose(0, 1).requires_grad_()
    y = layer(x, keep)
    y.backward(tensors["g"].transpose(0, 1) * keep[..., None])
    torch.testing.assert_close(y[keep], tensors["y"].transpose(0, 1)[keep], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x.grad, tensors["grad_x"].transpose(0, 1), rtol=1e-9, atol=1e-9)
    for ours, gradient in from_reference(layer, below(tensors, "grad.")).items():
        torch.testing.assert_close(layer.get_parameter(ours).grad, gradient, rtol=1e-9, atol=1e-9)


POSITIONS = ["t5", "alibi", "simple", "rotary", None]


def left_and_right_padded(x):
    """x (B, L, D) behind and in front of 4 tokens of NaN, with the attention masks."""
    B, L, D = x.shape
    garbage = torch.full((B, 4, D), torch.nan, dtype=x.dtype)
    mask = torch.tensor([[0] * 4 + [1] * L] * B)
    return (torch.cat([garbage, x], 1), mask), (torch.cat([x, garbage], 1), mask.flip(1))


@pytest.mark.parametrize("window", [(3, 0), (2, 4)])
@pytest.mark.parametrize("position", POSITIONS)
def test_padding_is_invisible(window, position):
    layer = nn.LocalAttention(8, 2, window=window, position=position).double()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    left, right = left_and_right_padded(x)
    torch.testing.assert_close(layer(*left)[:, 4:], layer(x))
    torch.testing.assert_close(layer(*right)[:, :9], layer(x))


@pytest.mark.parametrize("window", [(3, 0), (2, 4)])
@pytest.mark.parametrize("position", POSITIONS)
def test_packed_documents_are_alone(window, position):
    layer = nn.LocalAttention(8, 2, window=window, position=position).double()
    documents = [torch.randn(1, length, 8, dtype=torch.float64) for length in (5, 1, 7)]
    segment_ids = torch.tensor([[0] * 5 + [1] + [2] * 7])
    packed = layer(torch.cat(documents, 1), segment_ids=segment_ids)
    torch.testing.assert_close(packed, torch.cat([layer(x) for x in documents], 1))


@pytest.mark.parametrize("position", POSITIONS)
def test_layer_is_dense_attention_with_the_table_as_its_bias(position):
    layer = nn.LocalAttention(8, 2, window=(3, 2), position=position).double()
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    q, k, v = ((x @ weight.T).unflatten(-1, (2, 4)).transpose(1, 2) for weight in layer.qkv.weight.chunk(3))
    offset = torch.arange(7) - torch.arange(7)[:, None]
    bias = torch.zeros(2, 7, 7, dtype=torch.float64)
    if position is not None:
        bias = layer.position(3, 2)[:, (3 + offset).clamp(0, 5)]
    bias = bias.masked_fill((offset < -3) | (offset > 2), -torch.inf)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    torch.testing.assert_close(layer(x), layer.o(expected.transpose(1, 2).flatten(-2)))


@pytest.mark.parametrize("position", POSITIONS)
def test_compiles_without_graph_breaks(position):
    layer = nn.LocalAttention(8, 2, window=(3, 2), position=position).double()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    torch.testing.assert_close(compiled(x), layer(x))


REACHES = {
    "chunk": {"chunk_size": 4},
    "causal_chunk": {"chunk_size": 4, "causal": True},
    "full": {},
    "causal_full": {"causal": True},
    "window": {"window": (2, 4)},
}


@pytest.mark.parametrize("reach", REACHES.values(), ids=REACHES.keys())
@pytest.mark.parametrize("position", [*POSITIONS, "rope"])
def test_chunks_and_rows_are_alone_padded_and_packed(reach, position):
    layer = nn.LocalAttention(8, 2, **reach, position=position).double()
    documents = [torch.randn(1, length, 8, dtype=torch.float64) for length in (5, 1, 9)]
    alone = torch.cat([layer(x) for x in documents], 1)
    segment_ids = torch.tensor([[0] * 5 + [1] + [2] * 9])
    torch.testing.assert_close(layer(torch.cat(documents, 1), segment_ids=segment_ids), alone)
    left, right = left_and_right_padded(documents[2])
    torch.testing.assert_close(layer(*left)[:, 4:], alone[:, 6:])
    torch.testing.assert_close(layer(*right)[:, :9], alone[:, 6:])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("position", POSITIONS)
def test_a_row_is_a_window_that_holds_it(position, causal):
    """The tables of both begin at the same offset; "simple" ones have as many numbers."""
    row = nn.LocalAttention(8, 2, causal=causal, position=position, max_positions=9).double()
    window = nn.LocalAttention(8, 2, window=(8, 0 if causal else 8), position=position).double()
    window.load_state_dict(row.state_dict())
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(row(x), window(x))
    assert row(x[:, :0]).shape == (2, 0, 8)


def test_rope_turns_queries_and_keys():
    """Pair i of 2 turns by 100^-i a token; a score depends on the distance alone."""
    x = torch.randn(1, 1, 1, 4, dtype=torch.float64).expand(1, 12, 1, 4)
    turned = rotate(x)[0, :, 0]
    pairs = torch.complex(x[0, :, 0, :2], x[0, :, 0, 2:])
    angles = torch.arange(12.0)[:, None] * torch.tensor([1.0, 0.01], dtype=torch.float64)
    torch.testing.assert_close(
        torch.complex(turned[:, :2], turned[:, 2:]), pairs * torch.polar(1.0 + 0 * angles, angles)
    )
    scores = turned @ turned.T
    torch.testing.assert_close(scores[:-3, :-3], scores[3:, 3:])
    layer = nn.LocalAttention(8, 2, window=(3, 2), position="rope").double()
    plain = nn.LocalAttention(8, 2, window=(3, 2), position=None).double()
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(1, 7, 8, dtype=torch.float64)
    assert not torch.allclose(layer(x), plain(x))


def test_dropout_of_the_weights_acts_in_training_only():
    layer, x = nn.LocalAttention(8, 2, window=(2, 2), dropout=0.5), torch.randn(1, 6, 8)
    assert not torch.equal(layer(x), layer(x))
    torch.manual_seed(3)
    first = layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_projections_are_read_in_place():
    layer, x = nn.LocalAttention(32, 2, window=(3, 2)), torch.randn(2, 50, 32)
    with torch.profiler.profile(record_shapes=True) as profiler:
        layer(x)
    copied = [event.input_shapes[0] for event in profiler.events() if event.name in ("aten::copy_", "aten::clone")]
    assert all(math.prod(shape) < x.numel() for shape in copied)


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
        ({"d_model": 0}, r"d_model is 0, expected at least 1"),
        ({"n_heads": 3}, r"n_heads is 3, expected a divisor of d_model = 8"),
        ({"window": (1,)}, r"window is \(1,\), expected \(left, right\), both ints of 0 or more"),
        ({"window": 3}, r"window is 3, expected \(left, right\), both ints of 0 or more"),
        ({"n_heads": 2.0}, r"n_heads is 2.0, expected a divisor of d_model = 8"),
        ({"dropout": 1.5}, r"dropout is 1.5, expected 0 or more and less than 1"),
        ({"window": None, "chunk_size": 2.5}, r"chunk_size is 2.5, expected an int of at least 1, or None"),
        ({"window": (-1, 0)}, r"window is \(-1, 0\), expected \(left, right\), both ints of 0 or more"),
        ({"window": (1.5, 0)}, r"window is \(1.5, 0\), expected \(left, right\), both ints of 0 or more"),
        ({"position": "xpos"}, r"position is 'xpos', expected 't5', 'alibi', 'simple', 'rotary' or None"),
        ({"d_model": 6, "position": "rope"}, r"position is 'rope', expected another one for heads of odd width 3"),
        ({"causal": True}, r"window is \(2, 2\), expected a right of 0, since causal is True"),
        ({"chunk_size": 4}, r"chunk_size is 4, expected None beside a window"),
        ({"window": None, "chunk_size": 0}, r"chunk_size is 0, expected an int of at least 1, or None"),
        ({"d_model": 6, "position": "rotary"}, r"dim is 3, expected an even number of at least 2"),
        ({"num_buckets": 5}, r"num_buckets is 5, expected an even number of at least 4"),
        ({"max_distance": 16}, r"max_distance is 16, expected at least num_buckets = 32"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        nn.LocalAttention(**{"d_model": 8, "n_heads": 2, "window": (2, 2), **options})


@pytest.mark.parametrize("shape", [(5, 8), (2, 5, 7), (2, 5, 2, 8)], ids=str)
def test_errors_of_an_input(shape):
    layer = nn.LocalAttention(8, 2, window=(2, 2))
    with pytest.raises(ValueError, match=rf"^x has shape {re.escape(str(list(shape)))}, expected \(B, L, 8\)$"):
        layer(torch.zeros(shape))


def test_initial_weights_are_xavier_uniform():
    """Between -bound and bound = gain sqrt(6 / 2 D), of standard deviation bound / sqrt(3)."""
    layer = nn.LocalAttention(256, 4, window=(2, 2))
    weights = dict(zip("qkvo", (*layer.qkv.weight.chunk(3), layer.o.weight), strict=True))
    for name, gain in {"q": 2**-0.5, "k": 2**-0.5, "v": 2**-0.5, "o": 1}.items():
        weight, bound = weights[name], gain * (6 / 512) ** 0.5
        assert 0.999 * bound < weight.abs().max() <= bound, name
        assert abs(weight.std() * 3**0.5 / bound - 1) < 0.02, name


def by_steps(layer, x, state):
    return torch.stack([layer.step(token, state) for token in x.unbind(1)], dim=1)


@pytest.mark.parametrize("left", [0, 3, 20])
@pytest.mark.parametrize("position", [*POSITIONS, "rope"])
def test_steps_are_the_forward(left, position):
    layer = nn.LocalAttention(8, 2, window=(left, 0), position=position).double()
    x = torch.randn(2, 12, 8, dtype=torch.float64)
    torch.testing.assert_close(by_steps(layer, x, layer.initial_state(2)), layer(x))


@pytest.mark.parametrize("left", [0, 3, 20])
@pytest.mark.parametrize("lengths", [(1, 11), (5, 0, 2, 1, 4), (12,)], ids=str)
@pytest.mark.parametrize("position", ["t5", "rope"])
def test_pieces_with_a_state_are_the_forward(left, lengths, position):
    layer = nn.LocalAttention(8, 2, window=(left, 0), position=position).double()
    x = torch.randn(2, 16, 8, dtype=torch.float64)
    state, outputs = layer.initial_state(2), []
    for piece in x[:, :12].split(lengths, dim=1):
        before = [t.clone() for t in state]
        y, after = layer(piece, state=state)
        assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))
        outputs, state = [*outputs, y], after
    outputs.append(by_steps(layer, x[:, 12:], state))
    torch.testing.assert_close(torch.cat(outputs, dim=1), layer(x))


REACHES = [{"chunk_size": 1}, {"chunk_size": 5}, {"chunk_size": 20}, {}]


@pytest.mark.parametrize("reach", REACHES, ids=str)
@pytest.mark.parametrize("position", [*POSITIONS, "rope"])
def test_pieces_of_chunks_and_rows_are_the_forward(reach, position):
    layer = nn.LocalAttention(8, 2, **reach, causal=True, position=position).double()
    x = torch.randn(2, 17, 8, dtype=torch.float64)
    for lengths in ((6, 1, 0, 8, 2), (17,), (1, 16)):
        state, outputs = layer.initial_state(2), []
        for piece in x.split(lengths, dim=1):
            y, state = layer(piece, state=state)
            outputs.append(y)
        torch.testing.assert_close(torch.cat(outputs, dim=1), layer(x))
    if reach:
        torch.testing.assert_close(by_steps(layer, x, layer.initial_state(2)), layer(x))


@pytest.mark.parametrize("reach", [{"window": (3, 0)}, *REACHES[:3]], ids=str)
@pytest.mark.parametrize("position", ["t5", "rope"])
def test_padded_steps_leave_nothing_behind(reach, position):
    layer = nn.LocalAttention(8, 2, **reach, causal=True, position=position).double()
    x = torch.randn(2, 30, 8, dtype=torch.float64)
    mask = torch.rand(2, 30) < 0.6
    state, outputs = layer.initial_state(2), []
    for t in range(30):
        outputs.append(layer.step(x[:, t], state, attention_mask=mask[:, t]))
    for row, real in enumerate(mask):
        torch.testing.assert_close(torch.stack(outputs, 1)[row, real], layer(x[row : row + 1, real])[0])
    assert state[2].tolist() == mask.sum(1).tolist()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("left", [0, 3, 20])
@pytest.mark.parametrize("position", ["t5", "rope"])
def test_a_state_after_padding(left, side, position):
    """Rows of 9, 4 and 0 real tokens, then 5 of NaN and 2 real ones, then steps."""
    layer, lengths = nn.LocalAttention(8, 2, window=(left, 0), position=position).double(), [9, 4, 0]
    x = torch.randn(3, 15, 8, dtype=torch.float64)
    garbage = torch.full((3, 9, 8), torch.nan, dtype=torch.float64)
    state = layer.initial_state(3)
    rows = [x[i, :n] for i, n in enumerate(lengths)]
    prompt, mask = garbage.clone(), torch.zeros(3, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(9 - len(row), 9) if side == "left" else slice(len(row))
        prompt[i, place], mask[i, place] = row, 1
    first, state = layer(prompt, mask, state=state)
    more = torch.cat([garbage[:, :5], x[:, 9:11]] if side == "left" else [x[:, 9:11], garbage[:, :5]], dim=1)
    mask_of_more = torch.tensor([[0] * 5 + [1] * 2] * 3)
    mask_of_more = mask_of_more if side == "left" else mask_of_more.flip(1)
    second, state = layer(more, mask_of_more, state=state)
    last = by_steps(layer, x[:, 11:], state)
    assert state[2].tolist() == [n + 6 for n in lengths]
    for i, row in enumerate(rows):
        found = torch.cat([first[i][mask[i].bool()], second[i][mask_of_more[i].bool()], last[i]])
        torch.testing.assert_close(found, layer(torch.cat([row, x[i, 9:]])[None])[0])


def test_a_state_is_plain_tensors():
    """Beams: rows are taken by index_select."""
    layer = nn.LocalAttention(8, 2, window=(3, 0)).double()
    x, beams = torch.randn(3, 9, 8, dtype=torch.float64), torch.tensor([2, 0, 0])
    _, state = layer(x[:, :6], state=layer.initial_state(3))
    state = tuple(t.index_select(0, beams) for t in state)
    torch.testing.assert_close(by_steps(layer, x[beams][:, 6:], state), layer(x)[beams][:, 6:])


def test_a_state_under_autocast():
    layer = nn.LocalAttention(8, 2, window=(3, 0))
    x = torch.randn(2, 7, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state, expected = layer.initial_state(2), layer(x)
        y, state = layer(x[:, :5], state=state)
        found = torch.cat([y, by_steps(layer, x[:, 5:], state)], dim=1)
    assert found.dtype == state[0].dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)


def test_a_shared_table_in_steps():
    layer = nn.LocalAttention(8, 2, window=(3, 0), position=None).double()
    x, table = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    state = layer.initial_state(2)
    stepped = torch.stack([layer.step(token, state, table) for token in x.unbind(1)], dim=1)
    torch.testing.assert_close(stepped, layer(x, position_bias=table))


def test_gradients_pass_through_a_state():
    layer = nn.LocalAttention(8, 2, window=(3, 0)).double()
    x = torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=True)
    _, state = layer(x[:, :6], state=layer.initial_state(2))
    pieces = layer(x[:, 6:], state=state)[0]
    found, expected = (torch.autograd.grad(y.square().sum(), x)[0] for y in (pieces, layer(x)[:, 6:]))
    torch.testing.assert_close(found, expected)


def test_errors_of_a_state():
    x = torch.zeros(2, 5, 8)
    two_sided = nn.LocalAttention(8, 2, window=(2, 1))
    for call in (
        lambda: two_sided.initial_state(2),
        lambda: two_sided.step(x[:, 0], ()),
        lambda: two_sided(x, state=()),
    ):
        with pytest.raises(ValueError, match=r"^window is \(2, 1\), expected \(left, 0\) for a state"):
            call()
    with pytest.raises(ValueError, match=r"^causal is False, expected True for a state$"):
        nn.LocalAttention(8, 2, chunk_size=4).initial_state(2)
    with pytest.raises(ValueError, match=r"^whole rows has no steps, expected forward with a state for a token$"):
        nn.LocalAttention(8, 2, causal=True).step(x[:, 0], ())
    layer = nn.LocalAttention(8, 2, window=(2, 0))
    state = layer.initial_state(2)
    with pytest.raises(ValueError, match=r"^x has shape \[2, 5, 8\], expected \(B, 8\)$"):
        layer.step(x, state)
    with pytest.raises(
        ValueError, match=r"^state has keys \[3, 3, 2, 4\] of torch.float32, expected \[2, 3, 2, 4\] of"
    ):
        layer(x, state=layer.initial_state(3))
    with pytest.raises(ValueError, match=r"^segment_ids is given, expected None where a state is$"):
        layer(x, segment_ids=torch.zeros(2, 5, dtype=torch.long), state=state)
    with pytest.raises(ValueError, match=r"^attention_mask has padding between real tokens, expected it at the ends"):
        layer(x, torch.tensor([[1, 0, 1, 1, 1]] * 2), state=state)
