import re
from pathlib import Path

import pytest
import torch
from torch import nn

from spade_ext.convert import from_reference
from spade_ext.models import SpadeConfig, SpadeForSequenceClassification, SpadeModel, mixers, register_mixer
from spade_ext.nn import GatedAttention

from ..reference import below


def config(**options):
    sizes = {
        "vocab_size": 16,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "window": (3, 3),
        "ssm_d_state": 8,
        "ssm_n_ssm": 2,
        "dropout": 0.0,
    }
    return SpadeConfig(**{**sizes, **options})


def backbone(**options):
    return SpadeModel(config(**options)).eval().double()


def batch(B=2, L=13):
    return torch.randint(1, 16, (B, L))


def reached(model, token, L=13):
    """The tokens that `token` hears of."""
    x = torch.randn(1, L, 16, dtype=torch.float64, requires_grad=True)
    model(inputs_embeds=x).last_hidden_state[0, token].square().sum().backward()
    return (x.grad[0].abs().sum(-1) > 1e-12).nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"window": (2, 1)}, range(3, 7)),
        ({"mixer": "chunk", "window": None, "chunk_size": 4}, range(4, 8)),
        ({"mixer": "chunk", "window": None, "chunk_size": 4, "causal": True}, range(4, 6)),
        ({"mixer": "full", "window": None}, range(13)),
        ({"mixer": "full", "window": None, "causal": True}, range(6)),
    ],
    ids=["window", "chunk", "causal_chunk", "full", "causal_full"],
)
def test_a_mixer_reaches_what_its_name_says(options, expected):
    model = backbone(**options, ssm_layers=(), num_hidden_layers=1)
    assert reached(model, 5) == list(expected)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"window": (2, 1)}, range(3, 7)),
        ({"window": None, "chunk_size": 4}, range(4, 8)),
        ({"window": None}, range(13)),
    ],
    ids=["window", "chunk", "full"],
)
def test_mega_attends_where_the_configuration_says(options, expected):
    """Its moving average reaches everything."""
    mixer = backbone(**options, mixer="mega", position="simple", ssm_layers=()).layers[0].mixer.attention
    q = torch.randn(1, 13, 1, 64, dtype=torch.float64)
    v = torch.randn(1, 13, 32, dtype=torch.float64, requires_grad=True)
    mixer.attend(q, q, v[:, :, None], None)[0, 5].sum().backward()
    assert v.grad[0].abs().sum(-1).nonzero().flatten().tolist() == list(expected)


@pytest.mark.parametrize(
    "name",
    [
        "mega_attention_laplace_chunk8_bi1_simple_pre0",
        "mega_attention_relu2_chunk-1_bi0_rotary_pre1",
        "mega_attention_softmax_chunk-1_bi1_simple_pre1",
        "mega_attention_softmax_chunk8_bi1_rotary_pre1",
    ],
)
def test_mega_is_the_published_one(name, load_golden):
    """A model of one layer whose feed-forward adds nothing."""
    tensors, published = load_golden(name)
    chunk_size = published["chunk_size"] if published["chunk_size"] > 0 else None
    causal = not published["bidirectional"]
    model = backbone(
        mixer="mega",
        num_hidden_layers=1,
        num_attention_heads=1,
        ssm_layers=(),
        ssm_n_ssm=None,
        final_norm=False,
        window=None,
        hidden_size=published["embed_dim"],
        mega_z_dim=published["zdim"],
        mega_h_dim=published["hdim"],
        mega_n_dim=published["ndim"],
        mega_activation=published["attention_activation"],
        chunk_size=chunk_size,
        causal=causal,
        position=published["rel_pos_bias"],
        prenorm=published["prenorm"],
        max_position_embeddings=published["max_positions"],
    )
    layer = model.layers[0]
    nn.init.zeros_(layer.feed_forward.fc2.weight)
    layer.feed_forward_norm = nn.Identity()

    def ours(tensors):
        """Names below layer.mixer and layer.mixer_norm."""
        mixer = layer.mixer.attention
        reference = GatedAttention(
            mixer.d_model,
            mixer.z_dim,
            mixer.h_dim,
            published["ndim"],
            chunk_size=chunk_size,
            causal=causal,
            position=published["rel_pos_bias"],
        )
        converted = from_reference(reference, tensors)
        return {
            f"mixer_{name}" if name.startswith("norm.") else f"mixer.attention.{name}": value
            for name, value in converted.items()
        }

    missing, unexpected = layer.load_state_dict(ours(below(tensors, "state.")), strict=False)
    assert not unexpected and all(name.startswith("feed_forward") for name in missing)
    x = tensors["x"].transpose(0, 1).requires_grad_()
    real = ~tensors["padding_mask"] if "padding_mask" in tensors else torch.ones(x.shape[:2], dtype=torch.bool)
    y = model(inputs_embeds=x, attention_mask=real).last_hidden_state
    torch.testing.assert_close(y[real], tensors["y"].transpose(0, 1)[real], rtol=1e-9, atol=1e-9)
    y.backward(tensors["g"].transpose(0, 1))
    torch.testing.assert_close(x.grad, tensors["grad_x"].transpose(0, 1), rtol=1e-9, atol=1e-9)
    for name, gradient in ours(below(tensors, "grad.")).items():
        torch.testing.assert_close(layer.get_parameter(name).grad, gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("combine", ["concat", "add"])
def test_a_closed_state_space_model_opens_by_training(combine):
    model, ids = backbone(ssm_init_scale=0.0, ssm_combine=combine), batch()
    mixer = model.layers[0].mixer
    assert not mixer.ssm_norm.weight.any() and mixer.attention_norm.weight.all()
    assert reached(model, 0) == list(range(7))  # what two windows of 3 reach
    model(ids).last_hidden_state.square().sum().backward()
    assert not mixer.ssm.C.grad.any() and mixer.ssm_norm.weight.grad.any()
    torch.optim.SGD(model.parameters(), lr=1e-2).step()
    assert reached(model, 0) == list(range(13))


@pytest.mark.parametrize("combine", ["concat", "add", "stack"])
@pytest.mark.parametrize("mixer", ["chunk", "full", "mega"])
def test_combinations_are_those_of_the_paper(mixer, combine):
    """From the parts: g = ssm(x), l what the mixer makes of x, or of g in "stack"."""
    options = {"window": None, "chunk_size": 4 if mixer == "chunk" else None, "position": "simple"}
    model = backbone(mixer=mixer, ssm_combine=combine, ssm_weight=0.3, **options)
    layer, x = model.layers[0], torch.randn(2, 13, 16, dtype=torch.float64)
    mixer, normed = layer.mixer, layer.mixer_norm(x)
    g = mixer.ssm(normed)
    local = mixer.attention(g if combine == "stack" else normed, residual=x)
    if combine == "concat":
        local = mixer.aggregate(torch.cat([mixer.ssm_norm(g), mixer.attention_norm(local)], -1))
    if combine == "add":
        local = 0.3 * mixer.ssm_norm(g) + 0.7 * mixer.attention_norm(local)
    h = x + local
    expected = h + layer.feed_forward(layer.feed_forward_norm(h))
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("options", [{}, {"mixer": "full", "window": None}], ids=["window", "full"])
def test_a_shared_table_is_that_of_every_layer(options):
    shared, own = backbone(**options, position_shared=True), backbone(**options)
    assert shared.layers[1].mixer.attention.position is None
    state = shared.state_dict()
    table = "layers.{}.mixer.attention.position.weight"
    own.load_state_dict(state | {table.format(1): state[table.format(0)]})
    ids = batch()
    torch.testing.assert_close(shared(ids).last_hidden_state, own(ids).last_hidden_state)
    torch.nn.init.normal_(own.get_parameter(table.format(1)))
    assert not torch.allclose(shared(ids).last_hidden_state, own(ids).last_hidden_state)


def test_dropout_of_attention_and_activation():
    model = SpadeModel(config(attention_dropout=0.5, activation_dropout=0.25, dropout=0.0)).train()
    layer = model.layers[0]
    assert layer.mixer.attention.dropout == 0.5 and layer.feed_forward.dropout.p == 0.25 and layer.dropout.p == 0
    ids = batch()
    assert not torch.equal(model(ids).last_hidden_state, model(ids).last_hidden_state)
    model.eval()
    assert torch.equal(model(ids).last_hidden_state, model(ids).last_hidden_state)


def test_mega_drops_its_own_parts_out():
    layer = SpadeModel(config(mixer="mega", position="simple", dropout=0.5)).layers[1]
    assert layer.mixer.attention.dropout.p == 0.5
    assert isinstance(layer.mixer_dropout, nn.Identity) and layer.dropout.p == 0.5


@pytest.mark.parametrize("combine", ["concat", "add", "stack"])
def test_a_state_space_model_beside_mega_is_dropped_out(combine):
    layer = SpadeModel(config(mixer="mega", position="simple", dropout=1.0, ssm_combine=combine)).layers[0].train()
    x = torch.randn(2, 13, 16)
    assert torch.equal(layer(x), x) == (combine != "stack")  # MEGA itself keeps its gate's share of the residual
    assert isinstance(SpadeModel(config(mixer="ssm", dropout=0.5)).layers[0].mixer_dropout, nn.Dropout)


@pytest.fixture
def mean_mixer():
    """The code of docs/models.md, whose last block registers the mixer "mean"."""
    text = (Path(__file__).parents[2] / "docs/models.md").read_text()
    exec("\n".join(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)), {"__name__": __name__})
    yield
    del mixers.MIXERS["mean"]


@pytest.mark.parametrize("ssm_layers", [(), (0, 1)])
def test_a_user_adds_a_mixer(mean_mixer, ssm_layers, tmp_path):
    model = SpadeForSequenceClassification(config(mixer="mean", window=None, ssm_layers=ssm_layers)).eval()
    ids, mask = batch(2, 9), torch.tensor([[1] * 9, [0] * 3 + [1] * 6])
    logits = model(ids, mask).logits
    torch.testing.assert_close(model(ids[1:, 3:]).logits, logits[1:])
    model(ids, labels=torch.tensor([0, 1])).loss.backward()
    assert all(parameter.grad.any() for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(SpadeForSequenceClassification.from_pretrained(tmp_path)(ids, mask).logits, logits)


def test_a_mixers_name_is_taken_once():
    with pytest.raises(ValueError, match="^name is 'window', expected one that is not taken: window, chunk, full"):
        register_mixer("window")(nn.Module)


ATTENTIONS = {
    "window": {},
    "chunk": {"mixer": "chunk", "window": None, "chunk_size": 4, "position": "rope"},
    "causal_full": {"mixer": "full", "window": None, "causal": True, "position_shared": True},
    "mega": {"mixer": "mega", "window": None, "chunk_size": 4, "position": "simple", "mega_activation": "laplace"},
}


@pytest.mark.parametrize("options", ATTENTIONS.values(), ids=ATTENTIONS.keys())
def test_eager_attention_is_that_of_the_op_and_has_weights(options):
    model = backbone(**options)
    eager = SpadeModel._from_config(model.config, attn_implementation="eager").eval().double()
    eager.load_state_dict(model.state_dict())
    ids, mask = batch(), torch.tensor([[1] * 13, [0] * 4 + [1] * 9])
    output = eager(ids, mask, output_attentions=True)
    torch.testing.assert_close(output.last_hidden_state[mask == 1], model(ids, mask).last_hidden_state[mask == 1])
    heads = 1 if options.get("mixer") == "mega" else 2
    assert [weights.shape for weights in output.attentions] == [(2, heads, 13, 13)] * 2
    if options.get("mixer") != "mega":
        sums = output.attentions[0].sum(-1).transpose(1, 2)[mask == 1]
        torch.testing.assert_close(sums, torch.ones_like(sums))
    assert not output.attentions[1][1, :, 4:, :4].any()
    assert eager(ids).attentions is None


def test_attentions_are_of_the_eager_implementation_only():
    model = backbone()
    assert model.config._attn_implementation == "spade_local"
    with pytest.raises(
        ValueError, match="^output_attentions is True, expected attn_implementation 'eager', not 'spade"
    ):
        model(batch(), output_attentions=True)
    with pytest.raises(ValueError, match="^attn_implementation is 'sdpa', expected 'spade_local' or 'eager'$"):
        SpadeModel._from_config(config(), attn_implementation="sdpa")
    model.set_attn_implementation("eager")
    assert len(model(batch(), output_attentions=True).attentions) == 2
