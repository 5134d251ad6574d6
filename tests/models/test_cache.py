"""Decoding from a cache is the forward of everything at once: token by token, in pieces, by generate()."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.generation import CompileConfig

from spade_ext import nn
from spade_ext.models import SpadeCache, SpadeConfig, SpadeForCausalLM, SpadeModel

SIZES = {
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "ssm_d_state": 8,
    "ssm_n_ssm": 4,
    "ssm_l_max": 16,
    "causal": True,
    "pad_token_id": 0,
    "initializer_range": 0.5,
}
MEGA = {"mixer": "mega", "position": "simple", "mega_z_dim": 8, "ssm_layers": ()}
MODELS = {
    "window": {"window": (5, 0), "position_shared": True},
    "rope_s4d": {"window": (5, 0), "position": "rope", "ssm_kind": "s4d", "ssm_combine": "add"},
    "learned_ema": {"window": (40, 0), "position": "learned", "ssm_kind": "ema", "ssm_combine": "stack"},
    "sinusoidal": {"window": (0, 0), "position": "sinusoidal", "ssm_layers": (0, 1)},
    "postnorm": {"window": (3, 0), "position": "alibi", "prenorm": False, "embed_norm": True, "norm": "scalenorm"},
    "chunk": {"mixer": "chunk", "chunk_size": 4},
    "chunk_shared": {"mixer": "chunk", "chunk_size": 5, "position": "rotary", "position_shared": True},
    "full": {"mixer": "full", "ssm_layers": ()},
    "full_shared": {"mixer": "full", "position": "simple", "position_shared": True},
    "full_rope": {"mixer": "full", "position": "rope", "ssm_layers": (1,)},
    "mega_window": {**MEGA, "window": (5, 0)},
    "mega_chunk": {**MEGA, "chunk_size": 4, "position": "rotary", "ssm_layers": (0,)},
    "mega_relu2": {**MEGA, "chunk_size": 4, "mega_activation": "relu2"},
    "mega_full": {**MEGA, "max_position_embeddings": 40},
    "ssm": {"mixer": "ssm", "position": None},
    # Padding's row of every band is 0, of which norms blow the rounding errors up: no padding's id.
    "adaptive": {"window": (5, 0), "adaptive_cutoffs": (4, 9), "adaptive_factor": 2, "pad_token_id": None},
}
all_models = pytest.mark.parametrize("name", MODELS)
some_models = pytest.mark.parametrize("name", ["window", "learned_ema", "chunk", "full_shared", "mega_chunk"])
TOLERANCES = {"rtol": 1e-9, "atol": 1e-9}


def build(name, **options):
    return SpadeForCausalLM(SpadeConfig(**{**SIZES, **MODELS[name], **options})).double().eval()


def batch(B=3, L=24):
    return torch.randint(1, 20, (B, L))


def in_pieces(model, ids, lengths, **options):
    cache, logits = SpadeCache(model.config), []
    for piece in ids.split(lengths, dim=1):
        output = model(piece, cache=cache, **options)
        assert output.cache is cache
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


@all_models
def test_token_by_token_is_the_forward(name):
    model, ids = build(name), batch()
    with torch.no_grad():
        torch.testing.assert_close(in_pieces(model, ids, 1), model(ids, use_cache=False).logits, **TOLERANCES)


@all_models
@pytest.mark.parametrize("lengths", [(9, 1, 1, 5, 0, 8), (24,), (1, 23)], ids=str)
def test_pieces_are_the_forward(name, lengths):
    model, ids = build(name), batch()
    with torch.no_grad():
        torch.testing.assert_close(in_pieces(model, ids, lengths), model(ids, use_cache=False).logits, **TOLERANCES)


@all_models
def test_gradients_pass_from_piece_to_piece(name):
    """Also through lone tokens, in training; of kernel "s4" the state that is handed on has no gradient."""
    model, ids = build(name, **({} if MODELS[name].get("ssm_kind") else {"ssm_kind": "s4d"})).train(), batch(2, 9)
    model.zero_grad()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0
    in_pieces(model, ids, (4, 1, 4)).square().sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model(ids).logits.square().sum().backward()
    for parameter, value in model.named_parameters():
        torch.testing.assert_close(found[parameter], value.grad, **TOLERANCES, msg=lambda m, n=parameter: f"{n}: {m}")


@all_models
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_leaves_nothing_behind(name, side):
    """Rows of 9, 4 and 1 real tokens, then pieces of 1, 3 and 1, some of them padded, in which masks are of new tokens
    or, as generate() has them, of all."""
    model, real = build(name), batch(3, 13)
    masks, ids, taken = [], [], torch.zeros(3, dtype=torch.long)
    for L, lengths in ((9, (9, 4, 1)), (1, (1, 0, 1)), (3, (2, 3, 0)), (1, (1, 1, 1))):
        piece, mask = torch.full((3, L), 3), torch.zeros(3, L, dtype=torch.long)
        for row, n in enumerate(lengths):
            place = slice(L - n, L) if side == "left" else slice(n)
            piece[row, place], mask[row, place] = real[row, taken[row] : taken[row] + n], 1
            taken[row] += n
        ids.append(piece)
        masks.append(mask)
    cache, logits = SpadeCache(model.config), []
    with torch.no_grad():
        for index, piece in enumerate(ids):
            mask = torch.cat(masks[: index + 1], dim=1) if index % 2 else masks[index]
            logits.append(model(piece, attention_mask=mask, cache=cache).logits)
        assert cache.positions.tolist() == taken.tolist() and cache.get_seq_length() == 14
        mask, logits = torch.cat(masks, dim=1).bool(), torch.cat(logits, dim=1)
        for row, n in enumerate(taken.tolist()):
            alone = model(real[row : row + 1, :n], use_cache=False).logits
            torch.testing.assert_close(logits[row : row + 1, mask[row]], alone, **TOLERANCES)


def test_long_documents_do_not_drift():
    """4,096 positions with a window of 128 and l_max 1,024."""
    ids = batch(1, 4096)
    model = build("window", window=(128, 0), ssm_l_max=1024)
    for dtype, bound in ((torch.float64, 1e-9), (torch.float32, 2e-4)):
        model = model.to(dtype)
        with torch.no_grad():
            expected = model(ids, use_cache=False).logits
            with nn.reuse_kernels(model):
                found = in_pieces(model, ids, 1)
        error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert error.max() < bound, dtype
        assert error[0, -1000:].mean() < 3 * error[0, 1000:2000].mean(), dtype


@pytest.mark.parametrize("name", [name for name in MODELS if "full" not in name])
def test_a_cache_does_not_grow(name):
    model, cache, sizes = build(name, max_position_embeddings=1000), None, []
    with torch.no_grad():
        for L in (100, 1, 800):
            cache = model(batch(1, L), cache=cache, logits_to_keep=1).cache
            sizes.append(cache.nbytes)
    assert len(set(sizes)) == 1 and sizes[0] > 0 and cache.is_compileable


def test_a_cache_of_100_000_tokens():
    model = build("window").float()
    with torch.no_grad():
        sizes = [model(batch(1, L), logits_to_keep=1).cache.nbytes for L in (100, 100_000)]
    assert sizes[0] == sizes[1]


GENERATION = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "top_k": 5},
    "beams": {"num_beams": 3, "do_sample": False, "num_return_sequences": 2},
    "sampled_beams": {"num_beams": 2, "do_sample": True},
}


@some_models
@pytest.mark.parametrize("way", GENERATION)
def test_generation_from_a_cache_is_that_without(name, way):
    """Of left-padded prompts."""
    model, ids = build(name), batch(2, 7)
    mask = torch.ones_like(ids)
    ids[0, :3] = mask[0, :3] = 0
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        options = {"max_new_tokens": 9, "use_cache": use_cache, **GENERATION[way]}
        output = model.generate(
            ids, attention_mask=mask, return_dict_in_generate=True, output_scores=True, output_logits=True, **options
        )
        assert (output.cache is not None) == use_cache
        found.append((output.sequences, torch.stack(output.logits)))
    assert found[0][0].shape == (2 * GENERATION[way].get("num_return_sequences", 1), 16)
    torch.testing.assert_close(found[0], found[1], **TOLERANCES)


@some_models
def test_generation_goes_on_from_a_cache(name):
    """3 + 4 tokens are 7, whether the prompt is repeated or not; the cache that is handed back does not hold the last
    token."""
    model, ids = build(name), batch(2, 7)
    options = {"do_sample": False, "return_dict_in_generate": True, "pad_token_id": 0}
    expected = model.generate(ids, max_new_tokens=7, **options)
    first = model.generate(ids, max_new_tokens=3, **options)
    assert first.cache.get_seq_length() == 9 and first.cache.positions.tolist() == [9, 9]
    second = model.generate(first.sequences, max_new_tokens=4, cache=first.cache, **options)
    assert torch.equal(second.sequences, expected.sequences) and second.cache is first.cache
    embedded = model.generate(inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=7, **options)
    assert torch.equal(embedded.sequences, expected.sequences[:, 7:])


@pytest.mark.parametrize("name", ["window", "full"])
def test_generation_does_not_go_on_from_padding_that_was_read(name):
    """A row that ended before others did has read its padding, of which another turn's mask says that it is none."""
    model, ids = build(name), batch(2, 5)
    ends = model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1].item()
    options = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    first = model.generate(ids, max_new_tokens=4, eos_token_id=ends, **options)
    assert first.sequences[0, 6:].tolist() == [0, 0, 0] and first.sequences[1, 6] != 0
    turn = torch.cat([first.sequences, batch(2, 3)], dim=1)
    mask = torch.ones_like(turn)
    mask[0, 6:9] = 0
    read = "^attention_mask has 6 real tokens before the new ones in row 0, expected the 8 that the cache has read$"
    with pytest.raises(ValueError, match=read):
        model.generate(turn, attention_mask=mask, cache=first.cache, max_new_tokens=2, **options)
    again = model.generate(turn, attention_mask=mask, use_cache=False, max_new_tokens=2, **options)
    assert again.sequences.shape == (2, 14)


def test_a_prompt_in_chunks_and_a_static_cache():
    model, ids = build("window"), batch(2, 11)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, prefill_chunk_size=4, **options), expected)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)
    with pytest.raises(ValueError, match="^cache_implementation is 'quantized', expected None, 'dynamic' or 'static'$"):
        model.generate(ids, cache_implementation="quantized", **options)


@pytest.mark.parametrize("name", ["window", "rope_s4d", "learned_ema", "chunk", "mega_chunk", "ssm"])
def test_steps_compile_once(name):
    """One graph, with shapes that do not change."""
    torch.compiler.reset()
    model, ids = build(name), batch(2, 7)
    mask = torch.ones_like(ids)
    ids[0, :3] = mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False}
    expected = model.generate(ids, **options)
    config = CompileConfig(fullgraph=True, dynamic=False, backend="eager", mode=None)
    config._compile_all_devices = True
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(model.generate(ids, compile_config=config, **options), expected)


def test_a_cache_is_tensors():
    model, ids = build("window"), batch(3, 9)
    rows = torch.tensor([2, 0, 0])
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, 8:]
        for change, order in (
            (lambda cache: cache.reorder_cache(rows), rows),
            (lambda cache: cache.batch_select_indices(rows[:2]), rows[:2]),
            (lambda cache: cache.batch_repeat_interleave(2), torch.tensor([0, 0, 1, 1, 2, 2])),
        ):
            cache = model(ids[:, :8]).cache
            change(cache)
            torch.testing.assert_close(model(ids[order, 8:], cache=cache).logits, expected[order], **TOLERANCES)
    assert len(cache) == 2 and not any(cache.is_sliding)
    cache.reset()
    assert cache.get_seq_length() == cache.nbytes == 0
    with torch.no_grad():
        torch.testing.assert_close(model(ids, cache=cache).logits[:, 8:], expected, **TOLERANCES)


def test_segments_can_be_trained_on():
    """Truncated backpropagation through time: a detached cache hands on values."""
    model, ids = build("window").train(), batch(2, 12)
    cache = SpadeCache(model.config)
    for piece in ids.split(4, dim=1):
        model(piece, labels=piece, cache=cache).loss.backward()
        cache.detach()
    assert cache.positions.tolist() == [12, 12]
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_pieces_predict_each_others_first_tokens():
    """With shift_labels; with labels each piece's last token predicts nothing."""
    model, ids = build("window"), batch(2, 12)
    expected, mask = model(ids, labels=ids).loss, torch.ones_like(ids)
    following, cache, losses = pad(ids[:, 1:], (0, 1), value=-100), SpadeCache(model.config), []
    for begin in (0, 4, 8):
        piece = slice(begin, begin + 4)
        options = {"attention_mask": mask[:, : begin + 4], "num_items_in_batch": 22, "cache": cache}
        losses.append(model(ids[:, piece], shift_labels=following[:, piece], **options).loss)
    torch.testing.assert_close(sum(losses), expected)
    cache.reset()
    model(ids[:, :4], cache=cache)
    assert model(ids[:, 4:], labels=ids[:, 4:], attention_mask=mask, cache=cache).loss.isfinite()


def test_attentions_of_a_step():
    """In eager: those of the keys in the ring, then of the token itself."""
    model, ids = build("window", attn_implementation="eager"), batch(2, 9)
    with torch.no_grad():
        expected = model(ids, output_attentions=True).attentions
        cache = model(ids[:, :8]).cache
        found = model(ids[:, 8:], cache=cache, output_attentions=True).attentions
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a[:, :, 0, -6:], b[:, :, 8, -6:])
        torch.testing.assert_close(a.sum(-1), torch.ones(2, 2, 1, dtype=torch.float64))


def test_which_forwards_make_a_cache():
    model, ids = build("window"), batch(2, 6)
    assert isinstance(model(ids).cache, SpadeCache)
    assert isinstance(model(ids, use_cache=True, past_key_values=None).past_key_values, SpadeCache)
    assert model(ids, use_cache=False).cache is None
    assert model(ids, segment_ids=torch.ones_like(ids)).cache is None
    for mask, whole in (([0, 0, 1, 1, 1, 0], True), ([1, 0, 1, 1, 1, 1], False), ([0] * 6, True)):
        mask = torch.tensor([[1] * 6, mask])
        output = model(ids, attention_mask=mask)
        assert (output.cache is not None) == whole
        expected = model(ids, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(output.logits[mask.bool()], expected[mask.bool()], **TOLERANCES)
    assert model.train()(ids).cache is None
    assert SpadeForCausalLM(SpadeConfig(**SIZES, use_cache=False)).eval()(ids).cache is None
    two_sided = SpadeModel(SpadeConfig(**{**SIZES, "causal": False})).eval()
    assert two_sided.config.use_cache is False and two_sided(ids).cache is None


def test_errors_of_a_cache():
    model, ids = build("window"), batch(2, 6)
    with pytest.raises(TypeError, match="^cache is a DynamicCache, expected a SpadeCache, or None$"):
        model(ids, cache=DynamicCache())
    cache = model(ids).cache
    with pytest.raises(ValueError, match="^cache has 2 rows, expected 1$"):
        model(ids[:1], cache=cache)
    with pytest.raises(ValueError, match="^cache has 2 layers, expected 3$"):
        build("window", num_hidden_layers=3)(ids, cache=cache)
    with pytest.raises(ValueError, match="^segment_ids is given, expected rows of one document with a cache$"):
        model(ids, cache=cache, segment_ids=torch.ones_like(ids))
    with pytest.raises(ValueError, match="^position_ids start again, expected rows of one document with a cache$"):
        model(ids, cache=cache, position_ids=torch.tensor([[6, 7, 0, 1, 2, 3]]))
    with pytest.raises(
        ValueError,
        match=r"^attention_mask has shape \[2, 11\], expected \[2, 6\] or, with the tokens before, \[2, 12\]$",
    ):
        model(ids, cache=cache, attention_mask=torch.ones(2, 11))
    with pytest.raises(ValueError, match="^attention_mask has padding between real tokens, expected it at the ends of"):
        model(ids, cache=cache, attention_mask=torch.tensor([[1, 0, 1, 1, 1, 1]] * 2))
    with pytest.raises(ValueError, match="^tokens_to_remove is -1, expected 0: states cannot forget tokens$"):
        cache.crop(-1)
    with pytest.raises(TypeError, match="^cache is a SpadeCache, expected another one: only SPADE models"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)
    model(ids, cache=cache)
    assert cache.get_seq_length() == 12


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"causal": False}, "causal = False"),
        ({**MEGA, "window": (5, 0), "mega_truncation": 9}, "mega_truncation = 9"),
        ({"ssm_kind": "s4d", "ssm_disc": "dss"}, "ssm_disc = 'dss'"),
    ],
)
def test_configurations_without_a_cache(options, reason):
    options = {**SIZES, **options}
    with pytest.raises(StrictDataclassError, match=f"use_cache is True, expected False with {reason}$"):
        SpadeConfig(**options, use_cache=True)
    config = SpadeConfig(**options)
    assert config.use_cache is False
    with pytest.raises(ValueError, match=f"^config has {reason}, expected a model that can have a cache$"):
        SpadeCache(config)
    if config.causal:
        model, ids = SpadeForCausalLM(config).double().eval(), pad(batch(1, 3), (2, 0))
        assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 7)


def test_prefill_is_parallel(monkeypatch):
    """A prompt is one convolution a state space model, not a step a token."""
    model, ids = build("window"), batch(2, 12)
    ssm = model.model.layers[0].mixer.ssm
    monkeypatch.setattr(type(ssm), "step", lambda *_: pytest.fail("a step in a prefill"))
    with torch.no_grad():
        model(ids)
