from unittest.mock import patch

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from spade_ext.convert import from_reference, load_reference
from spade_ext.models import SpadeConfig, SpadeForSequenceClassification, SpadeModel
from spade_ext.models.modeling_spade import pool

from ..reference import below

MEGA = {"mixer": "mega", "position": "rotary", "mega_z_dim": 8, "mega_n_dim": 2}
OPTIONS = {
    "default": {},
    "postnorm": {"prenorm": False},
    "causal": {"causal": True, "window": (3, 0)},
    "shared_position": {"position_shared": True},
    "no_position": {"position": None},
    "alibi": {"position": "alibi"},
    "simple_position": {"position": "simple", "position_shared": True},
    "rotary": {"position": "rotary"},
    "ssm_everywhere": {"ssm_layers": (0, 1), "ssm_kind": "s4d", "ssm_disc": "bilinear", "ssm_init": "lin"},
    "no_ssm": {"ssm_layers": ()},
    "legt": {"ssm_init": "legt", "ssm_rank": 2, "causal": True, "window": (3, 0)},
    "s4d": {"ssm_kind": "s4d"},
    "ema": {"ssm_kind": "ema"},
    "causal_ema": {"ssm_kind": "ema", "causal": True, "window": (3, 0)},
    "add": {"ssm_combine": "add", "ssm_weight": 0.3},
    "stack": {"ssm_combine": "stack", "prenorm": False},
    "no_final_norm": {"final_norm": False},
    "postnorm_and_final_norm": {"prenorm": False, "final_norm": True, "ssm_combine": "add"},
    "frozen_ssm": {"ssm_lr": 0},
    "ssm_alone": {"mixer": "ssm", "position_shared": True},
    "causal_ssm_alone": {"mixer": "ssm", "ssm_kind": "ema", "causal": True},
    "rope": {"position": "rope"},
    "learned_position": {"position": "learned", "embed_norm": True},
    "sinusoidal_position": {"position": "sinusoidal", "scale_embedding": True},
    "chunk": {"mixer": "chunk", "window": None, "chunk_size": 4, "norm": "rmsnorm"},
    "causal_chunk": {"mixer": "chunk", "window": None, "chunk_size": 4, "causal": True, "ssm_combine": "stack"},
    "full": {"mixer": "full", "window": None, "position_shared": True, "norm": "scalenorm"},
    "causal_full": {"mixer": "full", "window": None, "position": "rope", "causal": True, "ssm_layers": ()},
    "simple_full": {"mixer": "full", "window": None, "position": "simple", "max_position_embeddings": 30},
    "mega": {"mixer": "mega", "window": None, "position": "simple", "prenorm": False, "mega_truncation": 5},
    "mega_chunk": {**MEGA, "window": None, "chunk_size": 4, "mega_activation": "laplace", "causal": True},
    "mega_window": {**MEGA, "ssm_combine": "add", "ssm_kind": "ema"},
    "closed_ssm": {"ssm_init_scale": 0.0},
}
all_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


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
        "num_labels": 3,
    }
    return SpadeConfig(**{**sizes, **options})


def classifier(**options):
    return SpadeForSequenceClassification(config(**options)).eval()


def batch(B=3, L=20):
    return torch.randint(1, 16, (B, L))


@all_options
def test_forward_and_every_gradient(options):
    model = classifier(**options).train()
    output = model(batch(), labels=torch.tensor([0, 1, 2]))
    assert output.logits.shape == (3, 3)
    output.loss.backward()
    closed = options.get("ssm_init_scale") == 0
    for name, parameter in model.named_parameters():
        expected = not (closed and ".ssm." in name)
        assert parameter.grad is not None and (parameter.grad.abs().sum() > 0) == expected, name


@all_options
def test_save_and_load_twice(options, tmp_path):
    model, ids = classifier(**options), batch()
    for folder in ("first", "second"):
        model.save_pretrained(tmp_path / folder)
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / folder).eval()
        assert isinstance(loaded, SpadeForSequenceClassification)
        assert loaded.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict() | {"_name_or_path": ""}
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        model = loaded
    with safe_open(tmp_path / "second" / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(model.state_dict())
    assert isinstance(AutoModel.from_pretrained(tmp_path / "first"), SpadeModel)
    assert isinstance(AutoConfig.from_pretrained(tmp_path / "first"), SpadeConfig)


@all_options
def test_weights_missing_from_a_checkpoint_are_those_of_a_new_model(options):
    """from_pretrained builds on the meta device: what is not made in _init_weights is lost there."""
    initialize = PreTrainedModel._initialize_weights

    def seeded(self, module, is_custom_code=False):
        torch.manual_seed(0)
        initialize(self, module, is_custom_code)

    with patch.object(PreTrainedModel, "_initialize_weights", seeded):
        new = SpadeForSequenceClassification(config(**options))
        loaded = SpadeForSequenceClassification.from_pretrained(None, config=config(**options), state_dict={})
    for name, value in new.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    ids = batch()
    assert torch.equal(new.eval()(ids).logits, loaded.eval()(ids).logits)


def test_partly_missing_weights_leave_the_loaded_ones_alone():
    model = classifier()
    state = {name: torch.full_like(value, 0.25) for name, value in model.state_dict().items()}
    del state["model.layers.0.mixer.ssm.C"], state["model.layers.1.mixer.attention.qkv.weight"]
    loaded = SpadeForSequenceClassification.from_pretrained(None, config=config(), state_dict=state)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, torch.full_like(value, 0.25)) == (name in state), name


@all_options
def test_padding_is_invisible(options):
    model, ids = classifier(**options).double(), batch(2, 9)
    alone = model.model(ids).last_hidden_state
    pad = torch.zeros(2, 4, dtype=torch.long)
    mask = torch.tensor([[1] * 9 + [0] * 4] * 2)
    right = model.model(torch.cat([ids, pad], 1), mask).last_hidden_state[:, :9]
    left = model.model(torch.cat([pad, ids], 1), mask.flip(1)).last_hidden_state[:, 4:]
    torch.testing.assert_close(right, alone)
    torch.testing.assert_close(left, alone)


@all_options
def test_packed_documents_are_those_alone(options):
    model, ids = SpadeModel(config(**options)).eval().double(), batch(2, 15)
    segment_ids = torch.tensor([[1] * 6 + [2] * 1 + [1] * 8, [0] * 15])
    mask = torch.ones(2, 15, dtype=torch.long)
    mask[1, :3] = mask[1, 12:] = 0
    packed = model(ids, mask, segment_ids=segment_ids).last_hidden_state
    for row, begin, end in ((0, 0, 6), (0, 6, 7), (0, 7, 15), (1, 3, 12)):
        alone = model(ids[row : row + 1, begin:end]).last_hidden_state[0]
        torch.testing.assert_close(packed[row, begin:end], alone)


@pytest.mark.parametrize("name", ["add_prenorm0", "concat_prenorm1", "stack_prenorm1"])
def test_layers_are_the_published_ones(name, load_golden):
    """A causal decoder of the fairseq code without its embeddings, whose layers share the first one's bias table."""
    tensors, published = load_golden(f"spade_decoder_{name}")
    s4 = published["s4"]
    model = SpadeModel(
        SpadeConfig(
            vocab_size=1,
            hidden_size=published["d_model"],
            num_hidden_layers=published["layers"],
            num_attention_heads=published["heads"],
            intermediate_size=published["ffn"],
            hidden_act=published["activation"],
            causal=True,
            window=(published["local_radius"], 0),
            position_shared=True,
            prenorm=published["prenorm"],
            final_norm=False,
            ssm_layers=(s4["layer"],),
            ssm_d_state=s4["d_state"],
            ssm_n_ssm=s4["n_ssm"],
            ssm_l_max=s4["l_max"],
            ssm_combine=published["combine"],
            ssm_weight=published["s4_weight"],
        )
    )
    model = model.eval().double()
    load_reference(model, below(tensors, "state."))
    x = tensors["x"].transpose(0, 1).requires_grad_()
    output = model(inputs_embeds=x, output_hidden_states=True)
    for hidden, key in zip(output.hidden_states[1:], ("y0", "y1", "y"), strict=True):
        torch.testing.assert_close(hidden, tensors[key].transpose(0, 1), rtol=1e-9, atol=1e-9)
    output.last_hidden_state.backward(tensors["g"].transpose(0, 1))
    torch.testing.assert_close(x.grad, tensors["grad_x"].transpose(0, 1), rtol=1e-9, atol=1e-9)
    expected = from_reference(model, below(tensors, "grad."))
    compared = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert compared == set(expected) - {"embed_tokens.weight"}
    for ours in compared:
        torch.testing.assert_close(model.get_parameter(ours).grad, expected[ours], rtol=1e-9, atol=1e-9)
    truncated = model.state_dict()[C := f"layers.{s4['layer']}.mixer.ssm.C"].clone()
    load_reference(model, below(tensors, "initial."))  # C is not truncated there; the published code does in float32
    torch.testing.assert_close(model.state_dict()[C], truncated, rtol=1e-5, atol=1e-5)
    y = model(inputs_embeds=x).last_hidden_state.transpose(0, 1)
    torch.testing.assert_close(y, tensors["y"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_batched_rows_are_those_alone(pooling):
    model, ids = classifier(pooling=pooling).double(), batch(3, 12)
    lengths = [12, 7, 1]
    mask = torch.arange(12) < torch.tensor(lengths)[:, None]
    batched = model(ids, mask).logits
    for row, length in enumerate(lengths):
        torch.testing.assert_close(batched[row], model(ids[row : row + 1, :length]).logits[0])


def test_pool_reads_real_tokens_only():
    x = torch.arange(1.0, 9.0).view(2, 4, 1)
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]])
    x[0, 0] = x[0, 3] = torch.nan
    assert pool(x, mask, "mean").flatten().tolist() == [2.5, 6.5]
    assert pool(x, mask, "first").flatten().tolist() == [2, 5]
    assert pool(x, mask, "last").flatten().tolist() == [3, 8]
    assert pool(x, mask.zero_(), "mean").flatten().tolist() == [0, 0]
    assert pool(torch.ones(1, 3, 1), None, "last").item() == 1


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_pool_keeps_the_precision_of_its_input(pooling):
    x, mask = torch.randn(2, 11, 4, dtype=torch.float64), torch.tensor([[0] * 4 + [1] * 7, [1] * 11])
    expected = {"mean": [x[0, 4:].mean(0), x[1].mean(0)], "first": [x[0, 4], x[1, 0]], "last": [x[0, 10], x[1, 10]]}
    pooled = pool(x, mask, pooling)
    torch.testing.assert_close(pooled, torch.stack(expected[pooling]), rtol=1e-12, atol=1e-12)
    many = torch.full((1, 3000, 1), 100.0, dtype=torch.float16)  # whose sum float16 cannot hold
    torch.testing.assert_close(pool(many, None, pooling), many[:, 0])


def test_input_values_are_embedded_by_a_linear(tmp_path):
    model, values = classifier(input_size=2), torch.randn(3, 20, 2)
    logits = model(input_values=values).logits
    assert (
        model.model.embed_values.bias.std() > 0.1
    )  # with equal biases a LayerNorm would see a lone number's sign only
    embedded = values @ model.model.embed_values.weight.T + model.model.embed_values.bias
    torch.testing.assert_close(model(inputs_embeds=embedded).logits, logits)
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForSequenceClassification.from_pretrained(tmp_path)(input_values=values).logits, logits)
    model(input_values=values, labels=torch.tensor([0, 1, 2])).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.model.embed_values.parameters())


@pytest.mark.parametrize("kind", ["s4", "s4d", "ema"])
def test_causal_model_sees_no_later_token(kind):
    model = SpadeModel(config(causal=True, window=(3, 0), ssm_kind=kind)).eval().double()
    ids = batch(1, 10)
    changed = ids.clone()
    changed[0, 6] = ids[0, 6] % 15 + 1
    difference = (model(ids).last_hidden_state - model(changed).last_hidden_state).abs().sum(-1)[0]
    assert (difference[:6] < 1e-12).all() and (difference[6:] > 1e-9).all()


@pytest.mark.parametrize("kind", ["s4", "s4d", "ema"])
def test_a_window_without_later_tokens_is_causal(kind, tmp_path):
    one_sided = config(window=(3, 0), ssm_kind=kind)
    one_sided.save_pretrained(tmp_path)
    for each in (one_sided, SpadeConfig.from_dict(one_sided.to_dict()), SpadeConfig.from_pretrained(tmp_path)):
        assert each.causal
        model = SpadeModel(each).eval().double()
        ids = batch(1, 10)
        changed = ids.clone()
        changed[0, -1] = ids[0, -1] % 15 + 1
        before, after = model(ids).last_hidden_state[0], model(changed).last_hidden_state[0]
        torch.testing.assert_close(before[:-1], after[:-1], rtol=1e-12, atol=1e-12)
        assert not torch.allclose(before[-1], after[-1])
    assert config(window=[3, 0]).causal and not config().causal


@pytest.mark.parametrize("disc", ["zoh", "bilinear", "dss"])
def test_state_space_model_has_the_options_of_the_configuration(disc):
    given = config(ssm_kind="s4d", ssm_disc=disc, ssm_init="quad", ssm_lr=0.01, ssm_d_state=6)
    layer = SpadeModel(given).layers[0].mixer.ssm
    assert (layer.kernel, layer.disc, layer.init, layer.lr, layer.d_state) == ("s4d", disc, "quad", 0.01, 6)
    given = config(ssm_init="legt", ssm_rank=3, ssm_n_ssm=4, ssm_l_max=33)
    layer = SpadeModel(given).layers[0].mixer.ssm
    assert (layer.kernel, layer.init, layer.rank, layer.n_ssm, layer.nodes) == ("s4", "legt", 3, 4, 33)


@pytest.mark.parametrize(("kind", "size"), [("s4", (16, 32, 2)), ("s4d", (16, 32, 2)), ("ema", (16, 16))])
def test_default_size_of_a_state(kind, size):
    assert SpadeModel(config(ssm_kind=kind, ssm_d_state=None)).layers[0].mixer.ssm.state_size == size


def test_dropout_of_the_feed_forward_is_before_its_last_linear():
    feed_forward = SpadeModel(config(dropout=1.0)).layers[0].feed_forward.train()
    torch.nn.init.ones_(feed_forward.fc2.bias)
    assert torch.equal(feed_forward(torch.randn(2, 5, 16)), torch.ones(2, 5, 16))


def test_the_state_space_model_reaches_beyond_every_window():
    """Two layers of window 3 reach 6 tokens; the state space model reaches all."""
    ids = batch(1, 40)
    changed = ids.clone()
    changed[0, 0] = ids[0, 0] % 15 + 1
    for layers, reaches in (((0,), True), ((), False)):
        model = SpadeModel(config(ssm_layers=layers)).eval().double()
        difference = (model(ids).last_hidden_state - model(changed).last_hidden_state).abs().sum(-1)[0]
        assert difference[:7].gt(0).all() and difference[7:].gt(0).all() == reaches


def test_resize_embeddings():
    model = classifier()
    model.resize_token_embeddings(26)
    assert model.config.vocab_size == 26
    assert model(torch.full((1, 5), 25)).logits.shape == (1, 3)


def test_half_precision_keeps_the_state_space_model_in_float32(tmp_path):
    model, ids = classifier(), batch()
    model.save_pretrained(tmp_path)
    for half in (
        SpadeForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16).eval(),
        classifier().bfloat16(),
    ):
        kinds = {("ssm" if ".ssm." in name else "rest", p.dtype) for name, p in half.named_parameters()}
        assert kinds == {("ssm", torch.float32), ("rest", torch.bfloat16)}
        assert half(ids).logits.dtype == torch.bfloat16


def test_autocast():
    model, ids = classifier(), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(ids).logits
    torch.testing.assert_close(logits.float(), model(ids).logits, rtol=0.1, atol=0.02)


def test_compiles_as_one_graph_for_all_lengths():
    model = classifier()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for L in (20, 33, 64):
        ids = batch(2, L)
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits)


def test_numbers_have_no_padding_id():
    assert config(input_size=2, pad_token_id=99).pad_token_id == 99


def test_regression_loss():
    model = classifier(num_labels=1)
    labels = torch.randn(3)
    output = model(batch(), labels=labels)
    torch.testing.assert_close(output.loss, (output.logits[:, 0] - labels).square().mean())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 0}, r"hidden_size is 0, expected at least 1"),
        ({"input_size": 0}, r"input_size is 0, expected at least 1, or None"),
        ({"num_attention_heads": 3}, r"num_attention_heads is 3, expected a divisor of hidden_size = 16"),
        ({"window": (3,)}, r"window is \(3,\), expected \(left, right\), both 0 or more"),
        ({"causal": True}, r"window is \(3, 3\), expected a right of 0, since causal is True"),
        ({"ssm_layers": (2,)}, r"ssm_layers is \(2,\), expected distinct layers from 0 to 1"),
        ({"ssm_init": "lin"}, r"ssm_init is 'lin', expected one of legs, legt, fout, hippo for ssm_kind 's4'"),
        ({"ssm_kind": "s4d", "ssm_init": "fout"}, r"ssm_init is 'fout', expected one of legs, lin, inv, quad, real"),
        ({"ssm_init": "legt"}, r"ssm_rank is 1, expected at least 2 for ssm_init 'legt'"),
        ({"ssm_l_max": 0}, r"ssm_l_max is 0, expected at least 1"),
        ({"ssm_combine": "sum"}, r"'ssm_combine' expected one of \('concat', 'add', 'stack'\), got sum"),
        ({"ssm_weight": 1.5}, r"ssm_weight is 1.5, expected 0 to 1"),
        ({"ssm_n_ssm": 3}, r"ssm_n_ssm is 3, expected a divisor of hidden_size = 16"),
        ({"ssm_d_state": 5}, r"ssm_d_state is 5, expected an even number"),
        ({"ssm_d_state": 0}, r"ssm_d_state is 0, expected at least 1"),
        ({"ssm_init": "hippo", "ssm_n_ssm": 1}, r"ssm_n_ssm is 1, expected an even number of copies for ssm_init 'hip"),
        (
            {"ssm_init": "hippo", "ssm_n_ssm": None, "hidden_size": 15, "num_attention_heads": 3},
            r"ssm_n_ssm is None, expected an even number of copies for ssm_init 'hippo'",
        ),
        ({"ssm_lr": -1e-3}, r"ssm_lr is -0.001, expected 0 or more"),
        (
            {"position": "rotary", "num_attention_heads": 16},
            r"position is 'rotary', expected another one for heads of odd width 1",
        ),
        ({"position_num_buckets": 5}, r"position_num_buckets is 5, expected an even number of at least 4"),
        ({"position_num_buckets": 2}, r"position_num_buckets is 2, expected an even number of at least 4"),
        ({"position_max_distance": 31}, r"position_max_distance is 31, expected at least position_num_buckets = 32"),
        ({"hidden_act": "gellu"}, r"hidden_act is 'gellu', expected an activation that transformers knows"),
        ({"pooling": "max"}, r"'pooling' expected one of \('mean', 'first', 'last'\), got max"),
        ({"mixer": "ful"}, r"mixer is 'ful', expected one of chunk, full, mega, ssm, window"),
        ({"mixer": "full"}, r"window is \(3, 3\), expected None for the mixer 'full'"),
        ({"mixer": "chunk", "chunk_size": 4}, r"window is \(3, 3\), expected None for the mixer 'chunk'"),
        ({"mixer": "chunk", "window": None}, r"chunk_size is None, expected at least 1 for the mixer 'chunk'"),
        ({"chunk_size": 4}, r"chunk_size is 4, expected None for the mixer 'window'$"),
        ({**MEGA, "chunk_size": 4}, r"chunk_size is 4, expected None beside a window$"),
        ({"chunk_size": 0}, r"chunk_size is 0, expected at least 1, or None"),
        ({**MEGA, "position": "t5"}, r"position is 't5', expected 'simple' or 'rotary' for the mixer 'mega'"),
        ({**MEGA, "mega_activation": "laplace"}, r"mega_activation is 'laplace', expected 'softmax' in a window"),
        ({**MEGA, "mega_z_dim": 3}, r"mega_z_dim is 3, expected an even number for 'rotary'"),
        ({**MEGA, "position_shared": True}, r"position_shared is True, expected False for the mixer 'mega'"),
        ({**MEGA, "attention_dropout": 0.1}, r"attention_dropout is 0.1, expected 0 for the mixer 'mega'"),
        ({"position": "rope", "position_shared": True}, r"position_shared is True, expected False for the position 'r"),
        ({"position": "rope", "num_attention_heads": 16}, r"position is 'rope', expected another one for heads of odd"),
        ({"position": "learned", "mixer": "ssm"}, r"position is 'learned', expected None for the mixer 'ssm'"),
        (
            {"position": "sinusoidal", "hidden_size": 9, "num_attention_heads": 3, "ssm_n_ssm": 1},
            r"hidden_size is 9, expected an even number of at least 4 for the position 'sinusoidal'",
        ),
        ({"dropout": 1.5}, r"dropout is 1.5, expected 0 to 1"),
        ({"attention_dropout": 1.0}, r"attention_dropout is 1.0, expected less than 1"),
        ({"ssm_init_scale": 0, "ssm_combine": "stack"}, r"ssm_init_scale is 0, expected 1 where nothing stands beside"),
        ({"pad_token_id": 16}, r"pad_token_id is 16, expected an id from 0 to 15, or None"),
        ({"pad_token_id": -1}, r"pad_token_id is -1, expected an id from 0 to 15, or None"),
        ({"adaptive_cutoffs": (8, 4)}, r"adaptive_cutoffs is \(8, 4\), expected rising ids from 1 to 15"),
        ({"adaptive_cutoffs": (4, 16)}, r"adaptive_cutoffs is \(4, 16\), expected rising ids from 1 to 15"),
        ({"adaptive_cutoffs": (4, 5, 6)}, r"adaptive_factor is 4, expected a last band of at least 1"),
        ({"adaptive_cutoffs": (4,), "tie_word_embeddings": False}, r"tie_word_embeddings is False, expected True"),
        (
            {"adaptive_cutoffs": (4,), "pad_token_id": 4},
            r"pad_token_id is 4, expected an id of the first band, below 4",
        ),
        ({"adaptive_cutoffs": (4,), "input_size": 1}, r"input_size is 1, expected None with adaptive_cutoffs"),
        ({"ssm_kind": "s5"}, r"'ssm_kind' expected one of \('s4', 's4d', 'ema'\), got s5"),
    ],
)
def test_configurations_that_cannot_be(options, message):
    with pytest.raises(StrictDataclassError, match=message):
        config(**options)


def test_a_classifier_makes_no_cache(monkeypatch):
    model = classifier(causal=True, window=(3, 0))
    monkeypatch.setattr(SpadeModel, "new_cache", lambda _: pytest.fail("a cache that nobody reads"))
    assert model(batch(), use_cache=True).logits.shape == (3, model.num_labels)


def test_wrong_inputs():
    model = classifier()
    with pytest.raises(ValueError, match="given are no inputs, expected either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="given are input_ids, inputs_embeds, expected either input_ids or inputs_em"):
        model(batch(), inputs_embeds=torch.zeros(3, 20, 16))
    with pytest.raises(ValueError, match="given are input_ids, expected either input_values or inputs_embeds"):
        classifier(input_size=1)(batch())
    with pytest.raises(ValueError, match=r"input_values has shape \[3, 20\], expected \(B, L, 1\)"):
        classifier(input_size=1)(input_values=torch.zeros(3, 20))
    with pytest.raises(ValueError, match=r"input_values has shape \[3, 20, 2\], expected \(B, L, 1\)"):
        classifier(input_size=1)(input_values=torch.zeros(3, 20, 2))
    with pytest.raises(ValueError, match=r"input_ids has shape \[20\], expected \(B, L\)"):
        model(batch()[0])
    for shape in ((20, 16), (3, 20, 15)):
        with pytest.raises(ValueError, match=r"inputs_embeds has shape \[.*\], expected \(B, L, 16\)"):
            model(inputs_embeds=torch.zeros(shape))
    with pytest.raises(ValueError, match=r"attention_mask has shape \[3, 1, 1, 20\], expected \[3, 20\], \(B, L\)"):
        model(batch(), torch.ones(3, 1, 1, 20))
    with pytest.raises(ValueError, match=r"^segment_ids has shape \[3, 20\], expected None: a row is one document"):
        model(batch(), segment_ids=torch.zeros(3, 20))
    with pytest.raises(ValueError, match=r"^position_ids has shape \[1, 20\], expected None: a row is one document"):
        model(batch(), position_ids=torch.zeros(1, 20))
