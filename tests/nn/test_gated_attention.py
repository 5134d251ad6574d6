import pytest
import torch

from spade_ext import nn
from spade_ext.convert import from_reference, load_reference

from ..reference import below

ACTIVATIONS = ["softmax", "relu2", "laplace"]
CHUNKS = [None, 4]


def gated(**options):
    """A layer whose queries, keys and biases are large enough to matter."""
    layer = nn.GatedAttention(6, 4, 10, 3, **options).double()
    with torch.no_grad():
        for parameter in (layer.gamma, layer.beta, *layer.position.parameters()):
            parameter.normal_()
        for linear in (layer.v_proj, layer.mx_proj, layer.h_proj):
            linear.reset_parameters()
    return layer


@pytest.mark.parametrize(
    "name",
    [
        "mega_attention_laplace_chunk8_bi1_simple_pre0",
        "mega_attention_relu2_chunk-1_bi0_rotary_pre1",
        "mega_attention_softmax_chunk-1_bi1_simple_pre1",
        "mega_attention_softmax_chunk8_bi1_rotary_pre1",
    ],
)
def test_layer_is_the_published_one(name, load_golden):
    tensors, config = load_golden(name)
    layer = nn.GatedAttention(
        config["embed_dim"],
        config["zdim"],
        config["hdim"],
        config["ndim"],
        chunk_size=config["chunk_size"] if config["chunk_size"] > 0 else None,
        causal=not config["bidirectional"],
        activation=config["attention_activation"],
        position=config["rel_pos_bias"],
        prenorm=config["prenorm"],
        max_positions=config["max_positions"],
    ).double()
    load_reference(layer, below(tensors, "state."))

    x = tensors["x"].transpose(0, 1).requires_grad_()  # published: (L, B, D)
    real = ~tensors["padding_mask"] if "padding_mask" in tensors else torch.ones(x.shape[:2], dtype=torch.bool)
    y = layer(x, real)
    y.backward(tensors["g"].transpose(0, 1))
    torch.testing.assert_close(y[real], tensors["y"].transpose(0, 1)[real], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x.grad, tensors["grad_x"].transpose(0, 1), rtol=1e-9, atol=1e-9)
    expected = from_reference(layer, below(tensors, "grad."))
    assert set(expected) == {name for name, _ in layer.named_parameters()}
    for ours, gradient in expected.items():
        torch.testing.assert_close(layer.get_parameter(ours).grad, gradient, rtol=1e-9, atol=1e-9)


def test_initial_values():
    layer = nn.GatedAttention(64, 512, 512, 4)
    for linear in (layer.v_proj, layer.mx_proj, layer.h_proj):
        assert abs(linear.weight.std() - 0.02) < 1e-3 and linear.weight.mean().abs() < 1e-3
        assert not linear.bias.any()
    assert abs(layer.gamma.std() - 0.02) < 2e-3 and layer.gamma.mean().abs() < 2e-3
    assert not layer.beta.any()
    assert abs(layer.position.weight.std() - 0.02) < 2e-3
    assert torch.equal(layer.norm.weight, torch.ones(64)) and not layer.norm.bias.any()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_padding_is_invisible(activation, chunk_size, causal):
    layer = gated(activation=activation, chunk_size=chunk_size, causal=causal)
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    garbage = torch.full((2, 6, 6), torch.nan, dtype=torch.float64)
    mask = torch.tensor([[1] * 9 + [0] * 6] * 2)
    torch.testing.assert_close(layer(torch.cat([x, garbage], 1), mask)[:, :9], layer(x))
    torch.testing.assert_close(layer(torch.cat([garbage, x], 1), mask.flip(1))[:, 6:], layer(x))


@pytest.mark.parametrize("position", ["simple", "rotary"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_packed_documents_are_alone(activation, chunk_size, causal, position):
    layer = gated(activation=activation, chunk_size=chunk_size, causal=causal, position=position)
    lengths = (5, 1, 9)
    documents = [torch.randn(1, length, 6, dtype=torch.float64) for length in lengths]
    garbage = torch.full((1, 3, 6), torch.nan, dtype=torch.float64)
    alone = torch.cat([layer(x) for x in documents], 1)
    segment_ids = torch.tensor([[0] * 5 + [1] + [2] * 9])
    torch.testing.assert_close(layer(torch.cat(documents, 1), segment_ids=segment_ids), alone)

    padded = torch.cat([garbage, *documents, garbage], 1)
    segment_ids = torch.nn.functional.pad(segment_ids, (3, 3), value=7)
    mask = torch.tensor([[0] * 3 + [1] * 15 + [0] * 3])
    torch.testing.assert_close(layer(padded, mask, segment_ids)[:, 3:-3], alone)


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_causal_layer_sees_nothing_later(activation, chunk_size):
    layer = gated(activation=activation, chunk_size=chunk_size, causal=True)
    x = torch.randn(1, 10, 6, dtype=torch.float64, requires_grad=True)
    layer(x)[0, 5].sum().backward()
    reached = x.grad[0].abs().sum(-1)
    assert (reached[:6] > 1e-6).all() and (reached[6:] < 1e-14).all()  # the convolution's rounding errors go both ways


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_rows_may_be_longer_than_max_positions(activation):
    """Only documents may not: as alone, whatever surrounds them."""
    layer = gated(activation=activation, max_positions=5)
    documents = [torch.randn(1, length, 6, dtype=torch.float64) for length in (5, 1, 4, 5)]
    garbage = torch.full((1, 7, 6), torch.nan, dtype=torch.float64)
    alone = [layer(x) for x in documents]
    padded = torch.cat([garbage, documents[0], garbage], 1)
    torch.testing.assert_close(layer(padded, torch.tensor([[0] * 7 + [1] * 5 + [0] * 7]))[:, 7:12], alone[0])
    packed, segment_ids = torch.cat(documents, 1), torch.tensor([[2] * 5 + [7] + [2] * 4 + [3] * 5])
    torch.testing.assert_close(layer(packed, segment_ids=segment_ids), torch.cat(alone, 1))
    both, segment_ids = torch.cat([packed, garbage], 1), torch.nn.functional.pad(segment_ids, (0, 7), value=3)
    mask = torch.tensor([[1] * 15 + [0] * 7])
    torch.testing.assert_close(layer(both, mask, segment_ids)[:, :15], torch.cat(alone, 1))
    nothing = torch.zeros(1, 22, dtype=torch.long)
    assert layer(torch.nan_to_num(both), nothing).isfinite().all()
    assert layer(torch.zeros(0, 22, 6, dtype=torch.float64)).shape == (0, 22, 6)


@pytest.mark.parametrize(
    ("mask", "segment_ids", "length"),
    [
        (None, None, 12),
        ([0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0], None, 6),
        ([0, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0], None, 7),
        (None, [0, 0, 0, 4, 4, 4, 4, 4, 4, 4, 4, 0], 8),
        ([1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 1], [0, 0, 0, 4, 4, 4, 4, 4, 4, 4, 4, 0], 6),
    ],
)
def test_documents_longer_than_max_positions_are_refused(mask, segment_ids, length):
    """Documents of the row before are short."""
    x = torch.randn(2, 12, 6, dtype=torch.float64)
    inputs = {}
    if mask is not None:
        inputs["attention_mask"] = torch.tensor([[1] + [0] * 11, mask])
    if segment_ids is not None:
        inputs["segment_ids"] = torch.tensor([list(range(12)), segment_ids])
    assert gated(max_positions=length)(x, **inputs).shape == x.shape
    message = f"^a document has {length} tokens, expected at most max_positions = {length - 1}$"
    with pytest.raises(ValueError, match=message):
        gated(max_positions=length - 1)(x, **inputs)


@pytest.mark.parametrize("position", ["simple", "rotary"])
@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_rows_without_tokens(chunk_size, position):
    layer = gated(chunk_size=chunk_size, position=position)
    for size in ((2, 0), (0, 0), (0, 5)):
        x = torch.zeros(*size, 6, dtype=torch.float64)
        assert layer(x).shape == layer(x, torch.ones(size).long(), torch.ones(size).long()).shape == x.shape


def test_attention_stays_in_its_chunk():
    """A chunk's values reach their own chunk only, whatever the moving average lets through."""
    layer = gated(chunk_size=4)
    q, k = torch.randn(2, 1, 10, 1, 4, dtype=torch.float64)
    v = torch.randn(1, 10, 10, dtype=torch.float64, requires_grad=True)
    layer.attend(q, k, v[:, :, None], None)[0, 5].sum().backward()
    assert v.grad[0].abs().sum(-1).nonzero().flatten().tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("position", ["simple", "rotary"])
def test_a_window_that_holds_the_row_is_the_row(position, causal):
    row = gated(position=position, causal=causal, max_positions=9)
    window = gated(position=position, causal=causal, window=(8, 0 if causal else 8))
    window.load_state_dict(row.state_dict())
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    torch.testing.assert_close(window(x), row(x))


def test_a_window_of_padded_and_packed_rows():
    layer = gated(window=(2, 1))
    documents = [torch.randn(1, length, 6, dtype=torch.float64) for length in (5, 1, 9)]
    garbage = torch.full((1, 3, 6), torch.nan, dtype=torch.float64)
    alone = torch.cat([layer(x) for x in documents], 1)
    padded = torch.cat([garbage, *documents, garbage], 1)
    mask, segment_ids = torch.tensor([[0] * 3 + [1] * 15 + [0] * 3]), torch.tensor([[7] * 8 + [1] + [2] * 12])
    torch.testing.assert_close(layer(padded, mask, segment_ids)[:, 3:-3], alone)
    q, v = torch.randn(1, 10, 1, 4), torch.randn(1, 10, 10, requires_grad=True)
    layer.attend(q.double(), q.double(), v.double()[:, :, None], None)[0, 5].sum().backward()
    assert v.grad[0].abs().sum(-1).nonzero().flatten().tolist() == [3, 4, 5, 6]


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "scalenorm"])
@pytest.mark.parametrize("prenorm", [False, True])
def test_norm_stands_before_or_after(norm, prenorm):
    layer = gated(norm=norm, prenorm=prenorm)
    bare = gated(norm=norm, prenorm=not prenorm)
    bare.load_state_dict(layer.state_dict())
    bare.norm = torch.nn.Identity()
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    if prenorm:
        # The residual connection is that of x itself: y - x = u (h - x).
        normed = layer.norm(x)
        torch.testing.assert_close(gate_and_update(layer, normed, x), layer(x))
    else:
        torch.testing.assert_close(layer.norm(bare(x)), layer(x))


def gate_and_update(layer, normed, x, factor=1):
    """MEGA's equations without prenorm, from x~ and the residual x; dropout multiplies by a factor."""
    D, Z, E = layer.d_model, layer.z_dim, layer.h_dim
    u, zr, g = layer.mx_proj(factor * layer.ema(normed)).split([D, Z + E, D], dim=-1)
    z, r = torch.nn.functional.silu(zr).split([Z, E], dim=-1)
    q, k = (z * layer.gamma[i] + layer.beta[i] for i in (0, 1))
    L = x.size(1)
    offset = torch.arange(L) - torch.arange(L)[:, None]
    bias = layer.position(L - 1, L - 1)[0][L - 1 + offset]
    v = factor * torch.nn.functional.silu(layer.v_proj(normed))
    attended = (q @ k.mT / Z**0.5 + bias).softmax(-1) @ v
    h = factor * torch.nn.functional.silu(g + layer.h_proj(r * attended))
    return x + torch.sigmoid(u) * (h - x)


class Triple(torch.nn.Module):
    def forward(self, t):
        return 3 * t


def test_dropout_is_of_the_values_the_moving_average_and_h():
    layer, x = gated(), torch.randn(2, 7, 6, dtype=torch.float64)
    layer.dropout = Triple()
    torch.testing.assert_close(layer(x), gate_and_update(layer, layer.norm(x), x, factor=3))


def test_dropout_acts_in_training_only():
    layer = gated(dropout=0.5)
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    trained = layer(x)
    assert not torch.equal(trained, layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x)) and not torch.equal(layer(x), trained)


@pytest.mark.parametrize("position", ["simple", "rotary"])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "scalenorm"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_reach_every_parameter(activation, norm, position):
    layer = gated(activation=activation, norm=norm, position=position, chunk_size=4)
    layer(torch.randn(2, 11, 6, dtype=torch.float64)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_half_precision_module(activation, dtype):
    layer = gated(activation=activation, chunk_size=4)
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    expected = layer(x)
    y = layer.float().to(dtype)(x.to(dtype))
    assert y.dtype == dtype and {p.dtype for p in layer.ema.parameters()} == {torch.float32}
    assert (y.double() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_autocast(activation):
    layer = gated(activation=activation, chunk_size=4).float()
    x = torch.randn(2, 9, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.float32 and (y - layer(x)).norm() < 0.03 * layer(x).norm()
    y.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


@pytest.mark.parametrize("options", [{"chunk_size": 4}, {"causal": True, "activation": "laplace"}])
def test_compiles_without_graph_breaks(options):
    layer = gated(**options)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (9, 14):
        x = torch.randn(2, length, 6, dtype=torch.float64)
        mask = torch.ones(2, length, dtype=torch.bool)
        torch.testing.assert_close(compiled(x, mask), layer(x, mask))


def test_parameter_options_are_of_its_own_parameters():
    layer = gated()
    assert layer.parameter_options() == {"gamma": {"weight_decay": 0.0}, "beta": {"weight_decay": 0.0}}
    assert set(layer.parameter_options()) == {name for name, _ in layer.named_parameters(recurse=False)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 0}, r"d_model is 0, expected at least 1"),
        ({"z_dim": 0}, r"z_dim is 0, expected at least 1"),
        ({"h_dim": -1}, r"h_dim is -1, expected at least 1"),
        ({"chunk_size": 0}, r"chunk_size is 0, expected an int of at least 1, or None"),
        ({"activation": "relu"}, r"activation is 'relu', expected 'softmax', 'relu2' or 'laplace'"),
        ({"position": "t5"}, r"position is 't5', expected 'simple' or 'rotary'"),
        ({"position": "rotary", "z_dim": 5}, r"dim is 5, expected an even number of at least 2"),
        ({"norm": "batchnorm"}, r"norm is 'batchnorm', expected 'layernorm', 'rmsnorm' or 'scalenorm'"),
        ({"window": (2,)}, r"window is \(2,\), expected \(left, right\), both ints of 0 or more"),
        ({"window": 3}, r"window is 3, expected \(left, right\), both ints of 0 or more"),
        ({"window": (1.5, 2.0)}, r"window is \(1.5, 2.0\), expected \(left, right\), both ints of 0 or more"),
        ({"window": (2, 1), "causal": True}, r"window is \(2, 1\), expected a right of 0, since causal is True"),
        ({"window": (2, 1), "chunk_size": 4}, r"chunk_size is 4, expected None beside a window"),
        ({"window": (2, 1), "activation": "relu2"}, r"window is \(2, 1\), expected None for activation 'relu2'"),
        ({"max_positions": 0}, r"max_positions is 0, expected at least 1"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        nn.GatedAttention(**{"d_model": 8, "z_dim": 4, "h_dim": 8, "n_dim": 2, **options})


@pytest.mark.parametrize(
    ("shape", "inputs", "message"),
    [
        ((2, 5, 7), {}, r"x has shape \[2, 5, 7\], expected \(B, L, 6\)"),
        ((5, 6), {}, r"x has shape \[5, 6\], expected \(B, L, 6\)"),
        ((2, 9, 6), {}, r"a document has 9 tokens, expected at most max_positions = 8"),
        ((2, 5, 6), {"attention_mask": torch.ones(5)}, r"attention_mask has shape \[5\], expected \[2, 5\], \(B, L\)"),
        ((2, 5, 6), {"segment_ids": torch.ones(5).long()}, r"segment_ids has shape \[5\], expected \[2, 5\]"),
    ],
)
def test_errors_of_inputs(shape, inputs, message):
    layer = nn.GatedAttention(6, 4, 10, 3, max_positions=8)
    with pytest.raises(ValueError, match=message):
        layer(torch.zeros(shape), **inputs)


REACHES = [{"window": (3, 0)}, {"chunk_size": 4}, {"chunk_size": 4, "activation": "relu2"}, {}]


@pytest.mark.parametrize("reach", REACHES, ids=str)
@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize("position", ["simple", "rotary"])
def test_pieces_and_steps_are_the_forward(reach, prenorm, position):
    layer = gated(**reach, causal=True, position=position, prenorm=prenorm, max_positions=16)
    x = torch.randn(2, 15, 6, dtype=torch.float64)
    state, outputs = layer.initial_state(2), []
    for piece in x.split((6, 1, 0, 8), dim=1):
        y, after = layer(piece, state=state)
        outputs, state = [*outputs, y], after
    torch.testing.assert_close(torch.cat(outputs, dim=1), layer(x))
    if reach and "activation" not in reach:
        state = layer.initial_state(2)
        stepped = torch.stack([layer.step(token, state) for token in x.unbind(1)], dim=1)
        torch.testing.assert_close(stepped, layer(x))


@pytest.mark.parametrize("reach", REACHES[:2], ids=str)
def test_padded_steps_leave_nothing_behind(reach):
    layer = gated(**reach, causal=True)
    x = torch.randn(2, 30, 6, dtype=torch.float64)
    mask = torch.rand(2, 30) < 0.6
    state, outputs = layer.initial_state(2), []
    for t in range(30):
        outputs.append(layer.step(x[:, t], state, mask[:, t]))
    for row, real in enumerate(mask):
        torch.testing.assert_close(torch.stack(outputs, 1)[row, real], layer(x[row : row + 1, real])[0])


@pytest.mark.parametrize("reach", REACHES, ids=str)
def test_a_state_under_autocast(reach):
    layer = gated(**reach, causal=True).float()
    x = torch.randn(2, 7, 6)
    with torch.autocast("cpu", torch.bfloat16):
        expected, state = layer(x), layer.initial_state(2)
        y, state = layer(x[:, :5], state=state)
        outputs = [y]
        for token in x[:, 5:].split(1, dim=1):
            if layer.has_steps:
                outputs.append(layer.step(token[:, 0], state)[:, None])
            else:
                y, state = layer(token, state=state)
                outputs.append(y)
    assert state[1][0].dtype == state[1][1].dtype == torch.bfloat16
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=0.01, atol=0.01)


def test_errors_of_a_state():
    x = torch.zeros(2, 5, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match="^causal is False, expected True for a state$"):
        gated().initial_state(2)
    with pytest.raises(ValueError, match="^truncation is 4, expected None for a state, which a cut average lacks$"):
        gated(causal=True, truncation=4).initial_state(2)
    layer = gated(causal=True, chunk_size=4, activation="laplace")
    with pytest.raises(ValueError, match="^activation 'laplace' has no steps, expected forward with a state for a"):
        layer.step(x[:, 0], layer.initial_state(2))
    with pytest.raises(ValueError, match="^segment_ids is given, expected None where a state is$"):
        layer(x, segment_ids=torch.ones(2, 5, dtype=torch.long), state=layer.initial_state(2))
    with pytest.raises(ValueError, match=r"^x has shape \[2, 5, 6\], expected \(B, 6\)$"):
        layer.step(x, layer.initial_state(2))
    row = gated(causal=True, max_positions=4)
    with pytest.raises(ValueError, match="^a document has 5 tokens, expected at most max_positions = 4$"):
        row(x[:, :1], state=row(x[:, :4], state=row.initial_state(2))[1])
