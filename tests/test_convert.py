import pytest
import torch

from spade_ext import nn
from spade_ext.convert import from_reference, load_reference, to_reference
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


STATE_SPACES = [
    "s4_fout_r1_s2_L64_bi0_c1",
    "s4_legs_r1_s1_L100_bi1_c1",
    "s4_legt_r2_s4_L100_bi1_c1",
    "s4d_diag-legs_zoh_L100_bi1_c1",
    "s4d_diag-lin_dss_L64_bi0_c1",
    "spaces_diag_diag-lin_r1_L80_bi1",
    "spaces_dplr_legs_r1_L64_bi0",
]
MADE_ANEW = ("rel_pos_bias._float_tensor", "kernel.kernel.A")  # hold nothing of their own


def s4_of(config, **options):
    """An nn.S4 of a golden file's sizes."""
    kernel = "s4d" if config["mode"] == "diag" else "s4"
    options = {"n_ssm": config["n_ssm"], "bidirectional": config["bidirectional"], "kernel": kernel} | options
    if kernel == "s4":
        options |= {"rank": config["rank"], "init": config.get("measure", config.get("init"))}
    return nn.S4(config["d_model"], config["d_state"], **options)


def assert_same(found, expected):
    """In names, types and bits, but for what is made anew."""
    assert found.keys() == expected.keys()
    for name in found.keys() - set(MADE_ANEW):
        assert found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name]), name


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
    module = s4_of(config, l_max=7)
    leaves = leaves_of(below(tensors, "state."))
    y = torch.func.functional_call(module.double(), from_reference(module, leaves), tensors["u"].mT)
    torch.testing.assert_close(y.mT, tensors["y"], rtol=1e-9, atol=1e-9)
    y.backward(tensors["g"].mT)
    for name, gradient in below(tensors, "grad.").items():
        torch.testing.assert_close(leaves[name].grad, gradient, rtol=1e-9, atol=1e-9)


def stack_of(published, **options):
    """A SpadeModel of the sizes of a golden file's layers."""
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
        **options,
    )
    return SpadeModel(config).eval().double()


def test_gradients_pass_to_a_published_stack_of_layers(load_golden):
    tensors, published = load_golden("spade_decoder_concat_prenorm1")
    module, leaves = stack_of(published), leaves_of(below(tensors, "state."))
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


@pytest.mark.parametrize("name", MODULES)
def test_there_and_back(name, load_golden):
    state = below(load_golden(name)[0], "state.")
    module = MODULES[name]().double()
    load_reference(module, state)
    assert_same(to_reference(module), state)


@pytest.mark.parametrize("name", STATE_SPACES)
def test_a_state_space_model_there_and_back(name, load_golden):
    tensors, config = load_golden(name)
    state = below(tensors, "state.")
    module = s4_of(config).double()
    load_reference(module, state)
    found = to_reference(module, source="state-spaces" if name.startswith("spaces") else "spade")
    assert_same(found, state)
    if "kernel.kernel.A" in found:
        torch.testing.assert_close(found["kernel.kernel.A"], state["kernel.kernel.A"], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("combine", ["add", "concat", "stack"])
def test_a_stack_of_layers_there_and_back(combine, load_golden):
    """Its embeddings stay as they are."""
    tensors, published = load_golden(f"spade_decoder_{combine}_prenorm{int(combine != 'add')}")
    state, module = below(tensors, "state."), stack_of(published, ssm_combine=combine)
    embedding = module.embed_tokens.weight.clone()
    load_reference(module, state)
    assert_same(to_reference(module), state)
    assert torch.equal(module.embed_tokens.weight, embedding)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.EMA(3, 1, bidirectional=True),
        lambda: nn.GatedAttention(3, 2, 5, 1, norm="scalenorm", position="rotary"),
        lambda: nn.GatedAttention(3, 1, 1, 2, norm="rmsnorm", max_positions=1),
        lambda: nn.LocalAttention(6, 3, window=(2, 1)),
        lambda: nn.S4(6, 2, n_ssm=1, channels=2, bidirectional=True, lr=0),
        lambda: nn.S4(6, 8, init="hippo", rank=3),
        lambda: nn.S4(4, 6, kernel="s4d", init="real"),
    ],
)
def test_ours_to_theirs_and_back(make):
    """Sizes of 1 among them, which a squeeze too many would lose."""
    module, other = make(), make()
    sources = ("spade", "state-spaces") if isinstance(module, nn.S4) else ("spade",)
    for source in sources:
        load_reference(other, to_reference(module, source=source))
        assert_same(other.state_dict(), module.state_dict())


def test_a_file_without_the_length_of_its_truncation():
    state = to_reference(nn.S4(4, 4))
    del state["kernel.kernel.L"]
    with pytest.raises(ValueError, match="^load_reference: tensors lacks kernel.kernel.L, expected among D, kernel"):
        load_reference(nn.S4(4, 4), state)


def test_shapes_that_do_not_fit():
    state = to_reference(nn.LocalAttention(4, 2, window=(1, 1)))
    state["k.weight"] = torch.zeros(4, 5)
    with pytest.raises(ValueError, match=r"^load_reference: k.weight has shape \[4, 5\], expected \[4, 4\]$"):
        load_reference(nn.LocalAttention(4, 2, window=(1, 1)), state)


def test_what_the_published_code_has_not():
    with pytest.raises(TypeError, match="^to_reference: module is a Linear, expected an EMA, "):
        to_reference(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="^to_reference: source is 'state-spaces', expected 'spade'$"):
        to_reference(nn.EMA(2), source="state-spaces")
    module = nn.EMA(2)
    module.scale = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="^to_reference: module has scale, expected only tensors that the published"):
        to_reference(module)


def test_many_names_are_not_all_listed():
    with pytest.raises(ValueError, match=r"tensors lacks delta, expected among n0, n1, .* n7 and 2 more$"):
        from_reference(nn.EMA(2), {f"n{index}": torch.zeros(1) for index in range(10)})
