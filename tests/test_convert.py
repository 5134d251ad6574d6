import pytest
import torch

from spade_ext import nn
from spade_ext.convert import from_reference, load_reference
from spade_ext.models import SpadeConfig, SpadeModel

from .reference import below

MODULES = {
    "mega_ema_D8_n2_bi0_trNone": lambda: nn.EMA(8, 2),
    "mega_attention_laplace_chunk8_bi1_simple_pre0": lambda: nn.GatedAttention(
        12, 8, 20, 4, chunk_size=8, activation="laplace", prenorm=False
    ),
    "mega_attention_relu2_chunk-1_bi0_rotary_pre1": lambda: nn.GatedAttention(
        12, 8, 20, 4, causal=True, activation="relu2", position="rotary"
    ),
    "local_attention_L33_R7_h2_d16_causal0_bias0_pad1": lambda: nn.LocalAttention(16, 2, window=(7, 7), position=None),
    "local_attention_L50_R7_h2_d16_causal1_bias1_pad0": lambda: nn.LocalAttention(16, 2, window=(7, 0)),
}


def leaves_of(state):
    return {name: t.clone().requires_grad_(t.is_floating_point()) for name, t in state.items()}


@pytest.mark.parametrize("name", MODULES)
def test_gradients_pass_to_the_published_tensors(name, load_golden):
    tensors, _ = load_golden(name)
    module = MODULES[name]()
    state = below(tensors, "state.")
    leaves = leaves_of(state)
    converted = from_reference(module, leaves)
    mask = tensors.get("keep")  # (B, L)
    g = tensors["g"].transpose(0, 1)
    y = torch.func.functional_call(module, converted, (tensors["x"].transpose(0, 1), mask))
    y.backward(g if mask is None else g * mask[..., None])
    for name, gradient in below(tensors, "grad.").items():
        torch.testing.assert_close(leaves[name].grad, gradient, rtol=1e-9, atol=1e-9)
    assert all(torch.equal(leaves[name], state[name]) for name in state)


@pytest.mark.parametrize(
    "name", ["s4_legt_r2_s4_L100_bi1_c1", "s4d_diag-lin_zoh_L64_bi0_c1", "spaces_dplr_legs_r1_L64_bi0"]
)
def test_gradients_pass_to_a_published_state_space_model(name, load_golden):
    """Called with the truncation of the file, which is not the module's own."""
    tensors, config = load_golden(name)
    kernel = "s4d" if config["mode"] == "diag" else "s4"
    options = {"n_ssm": config["n_ssm"], "bidirectional": config["bidirectional"], "l_max": 7, "kernel": kernel}
    if kernel == "s4":
        options |= {"rank": config["rank"], "init": config.get("measure", config.get("init"))}
    module = nn.S4(config["d_model"], config["d_state"], **options)
    leaves = leaves_of(below(tensors, "state."))
    y = torch.func.functional_call(module.double(), from_reference(module, leaves), tensors["u"].mT)
    torch.testing.assert_close(y.mT, tensors["y"], rtol=1e-9, atol=1e-9)
    y.backward(tensors["g"].mT)
    for name, gradient in below(tensors, "grad.").items():
        torch.testing.assert_close(leaves[name].grad, gradient, rtol=1e-9, atol=1e-9)


def test_gradients_pass_to_a_published_stack_of_layers(load_golden):
    tensors, published = load_golden("spade_decoder_concat_prenorm1")
    config = SpadeConfig(
        vocab_size=1,
        hidden_size=published["d_model"],
        num_hidden_layers=published["layers"],
        num_attention_heads=published["heads"],
        intermediate_size=published["ffn"],
        hidden_act="relu",
        causal=True,
        window=(published["local_radius"], 0),
        position_shared=True,
        final_norm=False,
        ssm_d_state=published["s4"]["d_state"],
        ssm_n_ssm=published["s4"]["n_ssm"],
    )
    module, leaves = SpadeModel(config).eval().double(), leaves_of(below(tensors, "state."))
    x = {"inputs_embeds": tensors["x"].transpose(0, 1)}
    y = torch.func.functional_call(module, from_reference(module, leaves), kwargs=x).last_hidden_state
    torch.testing.assert_close(y.transpose(0, 1), tensors["y"], rtol=1e-9, atol=1e-9)
    y.backward(tensors["g"].transpose(0, 1))
    for name, gradient in below(tensors, "grad.").items():
        torch.testing.assert_close(leaves[name].grad, gradient, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="^from_reference: final_norm is True, expected False"):
        from_reference(SpadeModel(SpadeConfig(vocab_size=1, hidden_size=16, num_attention_heads=2)), leaves)


@pytest.mark.parametrize("name", MODULES)
def test_every_parameter_is_loaded(name, load_golden):
    tensors, _ = load_golden(name)
    module = MODULES[name]().double()
    for parameter in module.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    load_reference(module, below(tensors, "state."))
    assert all(parameter.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("norm", ["rmsnorm", "scalenorm"])
def test_norms_have_their_published_names(norm, load_golden):
    tensors = below(load_golden("mega_attention_laplace_chunk8_bi1_simple_pre0")[0], "state.")
    del tensors["norm.norm.weight"], tensors["norm.norm.bias"]
    scale = {"rmsnorm": ("weight", torch.rand(12)), "scalenorm": ("scalar", torch.rand(1))}
    name, value = scale[norm]
    module = nn.GatedAttention(12, 8, 20, 4, chunk_size=8, norm=norm)
    load_reference(module, {**tensors, f"norm.norm.{name}": value})
    assert torch.equal(module.norm.weight, value)


def test_a_module_without_a_published_counterpart():
    with pytest.raises(TypeError, match=r"^from_reference: module is a Linear, expected an EMA, a GatedAttention, "):
        from_reference(torch.nn.Linear(2, 2), {})


def test_names_that_do_not_fit():
    module = nn.LocalAttention(4, 2, window=(1, 1), position=None)
    weights = {f"{name}.weight": torch.zeros(4, 4) for name in "qkvo"}
    del weights["o.weight"]
    with pytest.raises(ValueError, match=r"^from_reference: tensors lacks o.weight, expected among k.weight, q.weight"):
        from_reference(module, weights)
    weights |= {"o.weight": torch.zeros(4, 4), "o.bias": torch.zeros(4)}
    with pytest.raises(ValueError, match=r"^from_reference: tensors has o.bias, expected only .* LocalAttention: k\.w"):
        from_reference(module, weights)


def test_a_missing_name_is_named_in_full(load_golden):
    tensors = below(load_golden("mega_attention_laplace_chunk8_bi1_simple_pre0")[0], "state.")
    del tensors["move.delta"]
    with pytest.raises(ValueError, match=r"^from_reference: tensors lacks move.delta, expected among beta, gamma, "):
        from_reference(nn.GatedAttention(12, 8, 20, 4, chunk_size=8), tensors)
