from unittest.mock import patch

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from spade_ext.models import SpadeConfig, SpadeForSequenceClassification, SpadeModel
from spade_ext.models.modeling_spade import pool

OPTIONS = {
    "default": {},
    "postnorm": {"prenorm": False},
    "causal": {"causal": True, "window": (3, 0)},
    "shared_position": {"position_shared": True},
    "no_position": {"position": None},
    "ssm_everywhere": {"ssm_layers": (0, 1), "ssm_disc": "bilinear", "ssm_init": "lin"},
    "no_ssm": {"ssm_layers": ()},
    "frozen_ssm": {"ssm_lr": 0},
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
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


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


def test_all_tensors_are_parameters_or_buffers():
    with torch.device("meta"):
        model = classifier()
    model.to_empty(device="cpu")
    model.init_weights()
    assert model(batch()).logits.isfinite().all()


def test_partly_missing_weights_leave_the_loaded_ones_alone():
    model = classifier()
    state = {name: torch.full_like(value, 0.25) for name, value in model.state_dict().items()}
    del state["model.layers.0.mixer.ssm.C"], state["model.layers.1.mixer.attention.q.weight"]
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


def test_inputs_embeds_equal_input_ids():
    model, ids = classifier(), batch()
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embedded).logits, model(ids).logits)


def test_causal_model_sees_no_later_token():
    model = SpadeModel(config(causal=True, window=(3, 0))).eval().double()
    ids = batch(1, 10)
    changed = ids.clone()
    changed[0, 6] = ids[0, 6] % 15 + 1
    difference = (model(ids).last_hidden_state - model(changed).last_hidden_state).abs().sum(-1)[0]
    assert (difference[:6] < 1e-12).all() and (difference[6:] > 1e-9).all()


def test_the_state_space_model_reaches_beyond_every_window():
    """Two layers of window 3 reach 6 tokens; the state space model reaches all."""
    ids = batch(1, 40)
    changed = ids.clone()
    changed[0, 0] = ids[0, 0] % 15 + 1
    for layers, reaches in (((0,), True), ((), False)):
        model = SpadeModel(config(ssm_layers=layers)).eval().double()
        difference = (model(ids).last_hidden_state - model(changed).last_hidden_state).abs().sum(-1)[0]
        assert difference[:7].gt(0).all() and difference[7:].gt(0).all() == reaches


def test_tuple_output_and_hidden_states():
    model, ids = classifier(), batch()
    output = model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    assert torch.equal(model(ids, return_dict=False)[0], output.logits)


def test_activation_checkpointing_gives_equal_gradients():
    model, ids, labels = classifier().train(), batch(), torch.tensor([0, 1, 2])
    model.config.dropout = 0.0
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model(ids, labels=labels).loss.backward()
    plain = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    model.activation_checkpointing_enable()
    model(ids, labels=labels).loss.backward()
    for expected, parameter in zip(plain, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected)


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
        kinds = {"ssm" if ".ssm." in name else "rest": p.dtype for name, p in half.named_parameters()}
        assert kinds == {"ssm": torch.float32, "rest": torch.bfloat16}
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


def test_regression_loss():
    model = classifier(num_labels=1)
    labels = torch.randn(3)
    output = model(batch(), labels=labels)
    torch.testing.assert_close(output.loss, (output.logits[:, 0] - labels).square().mean())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 0}, r"hidden_size is 0, expected at least 1"),
        ({"num_attention_heads": 3}, r"num_attention_heads is 3, expected a divisor of hidden_size = 16"),
        ({"window": (3,)}, r"window is \(3,\), expected \(left, right\), both 0 or more"),
        ({"causal": True}, r"window is \(3, 3\), expected a right of 0, since causal is True"),
        ({"ssm_layers": (2,)}, r"ssm_layers is \(2,\), expected distinct layers from 0 to 1"),
        ({"ssm_init": "fout"}, r"ssm_init is 'fout', expected one of legs, lin, inv, quad, real"),
        ({"ssm_n_ssm": 3}, r"ssm_n_ssm is 3, expected a divisor of hidden_size = 16"),
        ({"ssm_d_state": 5}, r"ssm_d_state is 5, expected an even number of at least 2"),
        ({"hidden_act": "gellu"}, r"hidden_act is 'gellu', expected an activation that transformers knows"),
        ({"pooling": "max"}, r"'pooling' expected one of \('mean', 'first', 'last'\), got max"),
        ({"ssm_kind": "s5"}, r"'ssm_kind' expected one of \('s4d',\), got s5"),
    ],
)
def test_configurations_that_cannot_be(options, message):
    with pytest.raises(StrictDataclassError, match=message):
        config(**options)


def test_wrong_inputs():
    model = classifier()
    with pytest.raises(ValueError, match="input_ids and inputs_embeds are both or neither given, expected one"):
        model()
    with pytest.raises(ValueError, match=r"attention_mask has shape \[3, 1, 1, 20\], expected \[3, 20\], \(B, L\)"):
        model(batch(), torch.ones(3, 1, 1, 20))
