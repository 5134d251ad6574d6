"""Hugging Face models give with `attn_implementation="spade_local"` what they give with their own attention."""

import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    Llama4TextConfig,
    MistralConfig,
    ModernBertConfig,
    ModernBertForMaskedLM,
)
from transformers.masking_utils import create_sliding_window_causal_mask

import spade_ext.models  # noqa: F401  (registers spade_local)

SIZES = dict(vocab_size=50, hidden_size=32, intermediate_size=40, num_attention_heads=4, max_position_embeddings=64)
SIZES |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=None, initializer_range=0.5)
DECODER = dict(num_key_value_heads=2, head_dim=8, tie_word_embeddings=False)
CONFIGS = {
    "mistral": MistralConfig(**SIZES, **DECODER, num_hidden_layers=2, sliding_window=5),
    "gemma3": Gemma3TextConfig(
        **SIZES, **DECODER, num_hidden_layers=4, sliding_window=4, sliding_window_pattern=2, query_pre_attn_scalar=8
    ),
    "modernbert": ModernBertConfig(
        **(SIZES | dict(initializer_range=0.2)),
        num_hidden_layers=4,
        local_attention=6,
        global_attn_every_n_layers=2,
        cls_token_id=1,
        sep_token_id=2,
    ),
}
DECODERS = ["mistral", "gemma3"]


def build(config):
    torch.manual_seed(0)
    if isinstance(config, ModernBertConfig):
        return ModernBertForMaskedLM(config).eval()
    return AutoModelForCausalLM.from_config(config).eval()


def tokens(B, L):
    return torch.randint(3, 50, (B, L))


def logits_and_gradients(model, implementation, mask=None, **inputs):
    """Logits at real tokens, and gradients of a weighted sum of them, by parameter."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    logits = model(attention_mask=mask, **inputs).logits
    if mask is not None:
        logits = logits[mask.bool()]
    (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}


def assert_same(model, reference="eager", tolerance=1e-5, **inputs):
    expected = logits_and_gradients(model, reference, **inputs)
    found = logits_and_gradients(model, "spade_local", **inputs)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max()
        assert (found[name] - value).abs().max() <= tolerance * scale, name


def mask_of(padding):
    mask = torch.ones(3, 17, dtype=torch.long)
    if padding == "left":
        mask[0, :4] = mask[1, :9] = 0
    elif padding == "right":
        mask[0, -4:] = mask[1, -9:] = 0
    else:
        return None
    return mask


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients(name, padding):
    assert_same(build(CONFIGS[name]), mask=mask_of(padding), input_ids=tokens(3, 17))


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_in_float64(name, padding):
    """Against sdpa: the models' eager softmax is in float32."""
    model = build(CONFIGS[name]).double()
    assert_same(model, "sdpa", tolerance=1e-9, mask=mask_of(padding), input_ids=tokens(3, 17))


@pytest.mark.parametrize("name", DECODERS)
def test_packed_documents(name):
    """Documents that begin where position_ids start anew are alone, of any length."""
    lengths = (9, 1, 2, 14)
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = {"input_ids": tokens(1, sum(lengths)), "position_ids": position_ids, "use_cache": False}
    model = build(CONFIGS[name]).double()
    assert_same(model, "sdpa", tolerance=1e-9, **packed)
    with torch.no_grad():
        alone = [model(input_ids=ids, use_cache=False).logits for ids in packed["input_ids"].split(lengths, dim=1)]
        torch.testing.assert_close(model(**packed).logits, torch.cat(alone, dim=1))


def test_chunks():
    """Chunks of 4 begin at the first real token, as in Llama 4."""
    sizes = (
        SIZES
        | DECODER
        | dict(num_hidden_layers=4, attention_chunk_size=4, num_local_experts=2, intermediate_size_mlp=40)
    )
    model = build(Llama4TextConfig(**sizes)).double()
    assert set(model.config.layer_types) == {"chunked_attention", "full_attention"}
    assert_same(model, "sdpa", tolerance=1e-9, mask=mask_of("left"), input_ids=tokens(3, 17))


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
@pytest.mark.parametrize("name", DECODERS)
def test_generation(name, cache):
    """Prompts of different lengths, left padded, then more tokens than a window holds."""
    model, mask = build(CONFIGS[name]), mask_of("left")
    arguments = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 12}
    arguments |= {"use_cache": cache is not None, "cache_implementation": cache}
    ids = tokens(3, 17) * mask
    found = {}
    for implementation in ("eager", "spade_local"):
        model.set_attn_implementation(implementation)
        found[implementation] = model.generate(ids, **arguments)
    assert found["eager"].shape == (3, 29) and len(found["eager"][:, 17:].unique()) > 6
    assert torch.equal(found["spade_local"], found["eager"])


@pytest.mark.parametrize("name", DECODERS)
def test_a_prompt_in_pieces(name):
    """Several queries at once behind a cache."""
    model = build(CONFIGS[name])
    model.set_attn_implementation("spade_local")
    ids, cache, logits = tokens(2, 17), None, []
    with torch.no_grad():
        for piece in ids.split([3, 9, 1, 4], dim=1):
            output = model(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
        torch.testing.assert_close(torch.cat(logits, dim=1), model(ids).logits, rtol=0, atol=1e-5)


def test_a_bidirectional_decoder():
    model = build(MistralConfig(**SIZES, **DECODER, num_hidden_layers=2, sliding_window=3, is_causal=False)).double()
    assert_same(model, "sdpa", tolerance=1e-9, mask=mask_of("left"), input_ids=tokens(3, 17))


def test_a_window_of_the_token_itself():
    config = ModernBertConfig(**(CONFIGS["modernbert"].to_dict() | dict(local_attention=1, layer_types=None)))
    assert_same(build(config), mask=mask_of("left"), input_ids=tokens(3, 17))


def test_keys_that_the_mask_is_not_of_are_refused():
    """The sliding cache of transformers keeps all keys for a window of 1."""
    model = build(MistralConfig(**SIZES, **DECODER, num_hidden_layers=2, sliding_window=1))
    model.set_attn_implementation("spade_local")
    with pytest.raises(ValueError, match=r"^spade_local: there are \d+ keys, expected \d+ as in the mask$"):
        model.generate(tokens(2, 9), do_sample=False, max_new_tokens=4)


def test_attention_across_sequences():
    config = BertConfig(**SIZES, num_hidden_layers=1, is_decoder=True, add_cross_attention=True)
    model = BertModel(config).eval().double()
    memory = torch.randn(3, 17, 32, dtype=torch.float64)
    inputs = {"input_ids": tokens(3, 5), "encoder_hidden_states": memory, "encoder_attention_mask": mask_of("right")}
    found = {}
    for implementation in ("sdpa", "spade_local"):
        model.set_attn_implementation(implementation)
        found[implementation] = model(**inputs).last_hidden_state
    torch.testing.assert_close(found["spade_local"], found["sdpa"], rtol=0, atol=1e-9)


def test_no_dense_mask():
    """A dense mask of this row would take 100 GB."""
    config = MistralConfig(**SIZES, **DECODER, sliding_window=5)
    config._attn_implementation = "spade_local"
    L = 320_000
    embeds = torch.empty(1, 1, 32).expand(1, L, 32)
    mask = create_sliding_window_causal_mask(config, embeds, torch.ones(1, L), past_key_values=None)
    assert mask.window == (4, 0) and mask.attention_mask.shape == (1, L)


def test_dropout_follows_the_seed():
    config = MistralConfig(**SIZES, **DECODER, num_hidden_layers=2, sliding_window=5, attention_dropout=0.5)
    model = build(config).train()
    model.set_attn_implementation("spade_local")
    ids = tokens(2, 17)

    def run(seed):
        torch.manual_seed(seed)
        return logits_and_gradients(model, "spade_local", input_ids=ids)

    first = run(1)
    assert not torch.equal(first["logits"], run(2)["logits"])
    model.activation_checkpointing_enable()
    again = run(1)
    assert all(torch.equal(again[name], value) for name, value in first.items())
    model.eval()
    assert_same(model, input_ids=ids)


def test_compiled():
    model = build(CONFIGS["gemma3"])
    model.set_attn_implementation("spade_local")
    inputs = {"input_ids": tokens(3, 17), "attention_mask": mask_of("left"), "use_cache": False}
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager")(**inputs).logits
        torch.testing.assert_close(compiled, model(**inputs).logits)


@pytest.mark.parametrize(
    ("config", "inputs", "message"),
    [
        (
            Gemma2Config(**SIZES, **DECODER, num_hidden_layers=2, attn_logit_softcapping=30.0),
            {},
            "softcap is given, expected attention without it",
        ),
        (
            GptOssConfig(**SIZES, **DECODER, num_hidden_layers=2, num_local_experts=2, sliding_window=4),
            {},
            "s_aux is given, expected attention without it",
        ),
        (
            CONFIGS["mistral"],
            {"attention_mask": torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()},
            r"the mask is a tensor of shape \[2, 1, 9, 9\], "
            r"expected one that the model made of an attention_mask \(B, L\)",
        ),
        (
            CONFIGS["mistral"],
            {"output_attentions": True},
            "output_attentions is True, expected False, as weights are never kept",
        ),
        (
            Gemma3TextConfig(**SIZES, **DECODER, num_hidden_layers=2, use_bidirectional_attention=True),
            {},
            "the mask has a function of its own, expected a causal, sliding or full one",
        ),
    ],
)
def test_refusals(config, inputs, message):
    model = build(config)
    model.set_attn_implementation("spade_local")
    with pytest.raises(ValueError, match=f"^spade_local: {message}$"):
        model(tokens(2, 9), **inputs)


def test_blocks_of_tokens_that_see_each_other_are_refused():
    config = MistralConfig(**SIZES, **DECODER, sliding_window=4)
    config._attn_implementation = "spade_local"
    arguments = {"config": config, "inputs_embeds": torch.zeros(1, 9, 32), "attention_mask": None}
    arguments |= {"past_key_values": None}
    message = "^spade_local: the mask is not the same for all tokens, expected a causal, sliding or full one$"
    for blocks in ([-1, 0, 0, 0, -1, 1, 1, -1, -1], [0] * 9):
        with pytest.raises(ValueError, match=message):
            create_sliding_window_causal_mask(**arguments, block_sequence_ids=torch.tensor([blocks]))


def test_spade_ext_alone_imports_no_transformers():
    code = "import sys, spade_ext; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
